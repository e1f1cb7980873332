"""Our specs for other packages: the plain ViT that all of them have, and timm's arguments."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec


def plain_vit(spec: ViTSpec) -> tuple[ViTSpec, str]:
    """The same ViT without relative positions and LayerScale, which some packages do not have.

    Returns:
        The plain spec, and a note for the row; the note is empty if the spec was plain already.
    """
    plain = replace(
        spec,
        absolute_position=True,
        shared_relative_position=False,
        layer_relative_position=False,
        layer_scale=None,
    )
    note = "the plain ViT (no relative positions, no LayerScale): less work than ours"
    return plain, "" if plain == spec else note


def timm_arguments(spec: ViTSpec | SwinSpec) -> dict[str, Any]:
    """Arguments that the constructors of timm's ViT, BEiT and Swin have in common."""
    return {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "num_classes": 0,
        "embed_dim": spec.embed_dim,
        "num_heads": spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
        "qkv_bias": spec.qkv_bias,
    }


def timm_vit_arguments(spec: ViTSpec) -> dict[str, Any]:
    """Arguments that the constructors of timm's ViT and BEiT have in common."""
    return timm_arguments(spec) | {
        "depth": spec.depth,
        "norm_layer": partial(nn.LayerNorm, eps=spec.norm_eps),
    }
