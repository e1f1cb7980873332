"""The layout of microsoft/SimMIM checkpoints: pre-trained, which is also ours, and fine-tuned.

Buffers that the published code saves (`relative_position_index`, `attn_mask`) are dropped: they
follow from the architecture. A fine-tuned checkpoint has no prefix (`layers.0…`, `head.weight`)
where ours say `encoder.layers.0…`.
"""

import re
from typing import Any

from simmim.backbone.build import Spec
from simmim.backbone.vit import ViTSpec
from simmim.weights.architecture import buffer_hints
from simmim.weights.our_names import BUFFERS, HEADS, PREFIX, Converted, State
from simmim.weights.timm_config import hints_of_config, without_class_token_head


def matches(state: State) -> bool:
    """Whether the names are those of an official pre-training checkpoint, or of ours."""
    return f"{PREFIX}patch_embed.proj.weight" in state


def matches_finetuned(state: State) -> bool:
    """Whether the names are those of an official fine-tuned checkpoint."""
    if "patch_embed.proj.weight" not in state or any(name.startswith("decoder.") for name in state):
        return False
    if "blocks.0.attn.qkv.weight" in state:  # a plain ViT of timm has others for these
        return "blocks.0.attn.qkv.bias" not in state and "blocks.0.ls1.gamma" not in state
    if "layers.0.blocks.0.attn.qkv.weight" not in state or "head.fc.weight" in state:
        return False
    merged = any(re.match(r"layers\.\d+\.downsample\.", name) for name in state)
    return "layers.0.downsample.reduction.weight" in state or not merged


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """The parameters of an official pre-training checkpoint, whose names are ours."""
    return Converted(_parameters(state), buffer_hints(state), {})


def from_finetuned(state: State, config: dict[str, Any]) -> Converted:
    """The parameters of an official fine-tuned checkpoint, or of timm's BEiT, under our names."""
    named = {
        name if name.startswith(HEADS) else PREFIX + name: tensor
        for name, tensor in _parameters(state).items()
    }
    hints, metadata = hints_of_config(config)
    hints = buffer_hints(state) | {key: value for key, value in hints.items() if value is not None}
    converted = Converted(named, hints, metadata)
    if "blocks.0.attn.qkv.weight" in state:
        return without_class_token_head(converted, config)
    return converted


def to_finetuned(state: State, spec: Spec) -> State:
    """A classifier's parameters under the official names.

    Raises:
        ValueError: the official ViT would read this head from the class token.
    """
    if isinstance(spec, ViTSpec) and spec.final_norm:
        raise ValueError(
            "the official ViT classifies by the norm of the mean, or by the class token; this one "
            "by the mean of normalised tokens"
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def _parameters(state: State) -> State:
    """The parameters that a model has, without saved buffers and an unused norm of the mean."""
    return {
        name.replace(".rpe_mlp.", ".cpb_mlp."): tensor  # as the first SwinV2 checkpoints say
        for name, tensor in state.items()
        if not name.endswith(BUFFERS) and not name.startswith(f"{PREFIX}fc_norm.")
    }
