"""Whose names a checkpoint has, and what they are under ours."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simmim.convert import hf, mmpretrain, official, timm_layout
from simmim.convert.official import State

CONFIG_FILE = "config.json"


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
    """The configuration of Hugging Face's that stands beside a weights file; {} for none."""
    path = weights_file.with_name(CONFIG_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and "model_type" in values else {}


def to_ours(state: State, config: dict[str, Any]) -> Found:
    """A checkpoint of any known layout under our names.

    Args:
        state: names and tensors as they lie in the file.
        config: Hugging Face's configuration; {} for none.

    Raises:
        ValueError: the layout is unknown.
    """
    if official.matches(state):
        return Found("official", official.parameters(state))
    if official.matches_finetuned(state):
        return Found("official", official.from_finetuned(state))
    readers: list[tuple[str, Callable[[State], bool], Callable[..., Any]]] = [
        ("hf", hf.matches, hf.to_ours),
        ("mmpretrain", mmpretrain.matches, mmpretrain.to_ours),
        ("timm", timm_layout.matches, timm_layout.to_ours),
    ]
    for name, matches, convert in readers:
        if matches(state):
            converted, hints, metadata = convert(state, config)
            return Found(name, converted, hints, metadata)
    some = ", ".join(sorted(state)[:4])
    raise ValueError(
        "unknown layout; expected encoder.patch_embed.proj.weight as we and microsoft/SimMIM have "
        f"it, or the names of timm, Hugging Face or mmpretrain; found {some}, …"
    )
