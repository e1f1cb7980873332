"""Encoders by name, and by the architecture that a checkpoint stores."""

from dataclasses import asdict, fields
from typing import Any

from simmim.backbone.swin import Swin, SwinSpec
from simmim.backbone.swinv2 import SwinV2, SwinV2Spec
from simmim.backbone.vit import ViT, ViTSpec

SPEC_TYPES: dict[str, type[SwinSpec] | type[ViTSpec]] = {
    "swin": SwinSpec,
    "swinv2": SwinV2Spec,
    "vit": ViTSpec,
}

Spec = SwinSpec | SwinV2Spec | ViTSpec
Encoder = Swin | SwinV2 | ViT

PRESETS: dict[str, Spec] = {
    "swin_tiny": SwinSpec(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": SwinSpec(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": SwinSpec(),
    "swin_large": SwinSpec(embed_dim=192, num_heads=(6, 12, 24, 48), window_size=12),
    "swinv2_tiny": SwinV2Spec(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_small": SwinV2Spec(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_base": SwinV2Spec(),
    "swinv2_large": SwinV2Spec(embed_dim=192, num_heads=(6, 12, 24, 48)),
    # as the published code builds these two: without the paper's extra norm after every sixth block
    "swinv2_huge": SwinV2Spec(embed_dim=352, num_heads=(11, 22, 44, 88)),
    "swinv2_giant": SwinV2Spec(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128)),
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
    if isinstance(spec, SwinV2Spec):
        return SwinV2(spec)
    return Swin(spec) if isinstance(spec, SwinSpec) else ViT(spec)


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """A dictionary of plain values that `spec_from_dict` turns back into `spec`."""
    arch = next(name for name, kind in SPEC_TYPES.items() if type(spec) is kind)
    return {"arch": arch, **asdict(spec)}


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
