"""Finds out which program's names a checkpoint has, and gives it ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simmim.model.weights_file import read_notes
from simmim.weights import (
    convnet_layouts,
    hf_layout,
    mmpretrain_layout,
    official_layout,
    timm_layout,
)
from simmim.weights.architecture import window_hints
from simmim.weights.our_names import PREFIX, Converted, State

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

LAYOUTS = ("simmim", "official", "mmpretrain", "timm", "torchvision", "hf")


def read_config(weights_file: Path) -> dict[str, Any]:
    """The configuration that a weights file of another program has; {} for none.

    For Hugging Face that is the config.json beside it, extended by the image statistics of
    preprocessor_config.json under the names that they have there. For timm it is the metadata of
    the file, or timm's config.json beside it.
    """
    notes = read_notes(weights_file)
    for values in (_plain(notes.get("timm")), _json(weights_file.with_name(CONFIG_FILE))):
        if "architecture" in values:
            return values
        if "model_type" in values:
            statistics = _json(weights_file.with_name(PREPROCESSOR_FILE))
            keys = ("image_mean", "image_std")
            return values | {key: statistics[key] for key in keys if key in statistics}
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return _plain(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _plain(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


_READERS: dict[str, tuple[Callable[[State], bool], Callable[..., Converted]]] = {
    "official": (official_layout.matches, official_layout.to_ours),
    "finetuned": (official_layout.matches_finetuned, official_layout.from_finetuned),
    "hf": (hf_layout.matches, hf_layout.to_ours),
    "mmpretrain": (mmpretrain_layout.matches, mmpretrain_layout.to_ours),
    "timm": (timm_layout.matches, timm_layout.to_ours),
    "convnet": (convnet_layouts.matches, convnet_layouts.to_ours),
}

# The readers of a layout that are tried, where its name does not name the only one.
_READERS_OF: dict[str | None, list[str]] = {
    None: list(_READERS),
    "simmim": ["official", "convnet"],
    "official": ["official", "finetuned"],
    "timm": ["timm", "convnet"],
    "torchvision": ["convnet"],
}


def to_ours(
    state: State, config: dict[str, Any], layout: str | None = None, *, is_ours: bool = False
) -> tuple[str, Converted]:
    """A checkpoint of any known layout under our names, and the name of the layout.

    Args:
        state: names and tensors as they lie in the file.
        config: of `read_config`; {} for none.
        layout: whose names they are, one of LAYOUTS; None finds it out by the names.
        is_ours: whether the file says that it is ours; backbones that no other program has are then
            recognised too.

    Raises:
        ValueError: the layout is unknown, or not `layout`.
    """
    for name in _READERS_OF.get(layout, [layout or ""]):
        matches, convert = _READERS[name]
        if matches(state) or (name == "convnet" and convnet_layouts.is_of_timm(config)):
            converted = convert(state, config)
            hints = {key: value for key, value in converted.hints.items() if value is not None}
            if any(key.endswith(".logit_scale") for key in converted.state):
                hints = window_hints(state) | hints
            if name == "finetuned":  # whose names timm's BEiT has too
                name = "timm" if "architecture" in config else "official"
            if name == "convnet":
                name = convnet_layouts.layout_of(state, config, layout)
            return name, converted._replace(hints=hints)
    may_be_ours = is_ours and layout in (None, "simmim")
    if may_be_ours and any(name.startswith(PREFIX) for name in state):
        return "simmim", Converted(dict(state), {}, {})
    some = ", ".join(sorted(state)[:4])
    if layout is not None:
        raise ValueError(f"not the names of {layout}; found {some}, …")
    raise ValueError(
        "unknown layout; expected encoder.patch_embed.proj.weight as we and microsoft/SimMIM have "
        "it, or the names of timm, torchvision, Hugging Face or mmpretrain; found "
        f"{some}, …"
    )
