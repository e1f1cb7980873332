"""Encoders by name, and by the architecture that a checkpoint stores."""

from dataclasses import asdict, fields
from typing import Any

from simmim.backbone.swin import Swin, SwinSpec
from simmim.backbone.vit import ViT, ViTSpec

SPEC_TYPES = {"swin": SwinSpec, "vit": ViTSpec}

Spec = SwinSpec | ViTSpec
Encoder = Swin | ViT

PRESETS: dict[str, Spec] = {
    "swin_tiny": SwinSpec(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": SwinSpec(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": SwinSpec(),
    "swin_large": SwinSpec(embed_dim=192, num_heads=(6, 12, 24, 48), window_size=12),
    "vit_tiny": ViTSpec(embed_dim=192, num_heads=3),
    "vit_small": ViTSpec(embed_dim=384, num_heads=6),
    "vit_base": ViTSpec(),
    "vit_large": ViTSpec(embed_dim=1024, depth=24, num_heads=16),
    "vit_base_plain": ViTSpec(
        absolute_position=True, shared_relative_position=False, layer_scale=None
    ),
}


def build_encoder(spec: Spec) -> Encoder:
    """The encoder that `spec` describes, freshly initialised from torch's generator."""
    return Swin(spec) if isinstance(spec, SwinSpec) else ViT(spec)


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """A dictionary of plain values that `spec_from_dict` turns back into `spec`."""
    return {"arch": "swin" if isinstance(spec, SwinSpec) else "vit", **asdict(spec)}


def spec_from_dict(values: dict[str, Any]) -> Spec:
    """The architecture from plain values, as a checkpoint stores them.

    Raises:
        ValueError: an unknown architecture or field.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    arch = values.pop("arch", None)
    if arch not in SPEC_TYPES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(SPEC_TYPES)}")
    spec_type = SPEC_TYPES[arch]
    if unknown := set(values) - {f.name for f in fields(spec_type)}:
        raise ValueError(f"unknown fields of {arch}: {', '.join(sorted(unknown))}")
    spec: Spec = spec_type(**values)
    return spec
