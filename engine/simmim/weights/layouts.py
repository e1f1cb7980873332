"""Whose names a checkpoint has, and what they are under ours."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simmim.model.weights_file import read_notes
from simmim.weights import convnet_layouts, hf, mmpretrain, official, timm_layout
from simmim.weights.official import State

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

LAYOUTS = ("simmim", "official", "mmpretrain", "timm", "torchvision", "hf")


@dataclass(frozen=True)
class Found:
    """A checkpoint under our names.

    Attributes:
        layout: whose names it had.
        state: name → tensor.
        hints: what names and shapes cannot tell: image_size, num_heads, qk_scale, norm_eps.
        metadata: classes, mean, std, as far as they are told.
    """

    layout: str
    state: State
    hints: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def read_config(weights_file: Path) -> dict[str, Any]:
    """The configuration that a weights file of another program has; {} for none.

    Of Hugging Face: config.json beside it, with the image statistics of preprocessor_config.json
    under their names there. Of timm: its metadata, or timm's own config.json beside it.
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


_READERS: dict[str, tuple[Callable[[State], bool], Callable[..., Any]]] = {
    "official": (official.matches, official.to_ours),
    "finetuned": (official.matches_finetuned, official.from_finetuned),
    "hf": (hf.matches, hf.to_ours),
    "mmpretrain": (mmpretrain.matches, mmpretrain.to_ours),
    "timm": (timm_layout.matches, timm_layout.to_ours),
    "convnet": (convnet_layouts.matches, convnet_layouts.to_ours),
}

# What reads a layout, where it is not the reader of its name alone.
_READERS_OF: dict[str | None, list[str]] = {
    None: list(_READERS),
    "simmim": ["official", "convnet"],
    "official": ["official", "finetuned"],
    "timm": ["timm", "convnet"],
    "torchvision": ["convnet"],
}


def to_ours(
    state: State, config: dict[str, Any], layout: str | None = None, *, is_ours: bool = False
) -> Found:
    """A checkpoint of any known layout under our names.

    Args:
        state: names and tensors as they lie in the file.
        config: of `read_config`; {} for none.
        layout: whose names they are, one of LAYOUTS; None tells by the names.
        is_ours: whether the file says that it is ours, whose backbones have names of their own.

    Raises:
        ValueError: the layout is unknown, or not `layout`.
    """
    for name in _READERS_OF.get(layout, [layout or ""]):
        matches, convert = _READERS[name]
        if matches(state) or (name == "convnet" and convnet_layouts.is_of_timm(config)):
            converted, hints, metadata = convert(state, config)
            hints = {key: value for key, value in hints.items() if value is not None}
            if any(key.endswith(".logit_scale") for key in converted):
                hints = official.window_hints(state) | hints
            if name == "finetuned":  # whose names timm's BEiT has too
                name = "timm" if "architecture" in config else "official"
            if name == "convnet":
                name = convnet_layouts.layout_of(state, config, layout)
            return Found(name, converted, hints, metadata)
    own = is_ours and layout in (None, "simmim")
    if own and any(name.startswith(official.PREFIX) for name in state):
        return Found("simmim", dict(state), {}, {})
    some = ", ".join(sorted(state)[:4])
    if layout is not None:
        raise ValueError(f"not the names of {layout}; found {some}, …")
    raise ValueError(
        "unknown layout; expected encoder.patch_embed.proj.weight as we and microsoft/SimMIM have "
        "it, or the names of timm, torchvision, Hugging Face or mmpretrain; found "
        f"{some}, …"
    )
