"""The layouts of timm: Swin, SwinV2, ViT, and BEiT for a ViT with relative positions.

timm's Swin has the published names, but for the merging, which begins the next stage there, and for
the head, `head.fc`. It has neither mask token nor decoder. timm's BEiT has the names of the
published fine-tuned ViT, and `simmim.weights.official_layout` reads it. timm's ViT has one bias for
q, k and v, and calls its gains `ls1.gamma`.
"""

import re
from typing import Any

import torch

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.weights.our_names import BUFFERS, HEADS, PREFIX, Converted, State, masking_names
from simmim.weights.timm_config import hints_of_config, without_class_token_head

# timm's models that take every size as an argument.
_BASES = {
    "swin": "swin_base_patch4_window7_224",
    "swinv2": "swinv2_base_window8_256",
    "beit": "beit_base_patch16_224",
    "vit": "vit_base_patch16_224",
}

# Epsilon of the norms in its ViT and BEiT, which create_model cannot set.
_VIT_EPS = 1e-6


def matches(state: State) -> bool:
    """Whether the names are those of timm's Swin, or of its plain ViT."""
    return "patch_embed.proj.weight" in state and (
        "layers.0.blocks.0.attn.qkv.weight" in state or "blocks.0.attn.qkv.weight" in state
    )


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """The parameters under our names; see `simmim.weights.hf_layout.to_ours`."""
    if "blocks.0.attn.qkv.weight" in state:
        return _vit_to_ours(state, config)
    renamed: State = {}
    for name, tensor in state.items():
        if name.endswith(BUFFERS):
            continue
        if name.startswith("head.fc."):
            renamed[name.replace("head.fc.", "head.")] = tensor
        elif match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
            renamed[f"{PREFIX}layers.{int(match[1]) - 1}.downsample.{match[2]}"] = tensor
        else:
            renamed[PREFIX + name] = tensor
    return Converted(renamed, *hints_of_config(config))


def _vit_to_ours(state: State, config: dict[str, Any]) -> Converted:
    renamed: State = {}
    for name, tensor in state.items():
        if name.endswith(BUFFERS):
            continue
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.qkv\.bias", name):
            q, _, v = tensor.chunk(3)  # a key bias cancels in the softmax
            renamed[f"{PREFIX}{match[1]}.q_bias"] = q.clone()
            renamed[f"{PREFIX}{match[1]}.v_bias"] = v.clone()
        elif match := re.fullmatch(r"(blocks\.\d+)\.ls([12])\.gamma", name):
            renamed[f"{PREFIX}{match[1]}.gamma_{match[2]}"] = tensor
        else:
            renamed[name if name.startswith(HEADS) else PREFIX + name] = tensor
    return without_class_token_head(Converted(renamed, *hints_of_config(config)), config)


def from_ours(
    state: State, spec: Spec, kind: str, metadata: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """The parameters under timm's names, and what `timm.create_model` takes to build the model.

    Raises:
        ValueError: timm has no model that computes the same.
    """
    assert isinstance(spec, SwinSpec | ViTSpec)
    arguments: dict[str, Any] = {
        "img_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "embed_dim": spec.embed_dim,
        "mlp_ratio": spec.mlp_ratio,
        "qkv_bias": spec.qkv_bias,
        "num_classes": len(state["head.weight"]) if kind == "classifier" else 0,
        "drop_path_rate": spec.drop_path,
    }
    if spec.qk_scale is not None:
        raise ValueError("timm has no factor of q·k other than 1/√(head width)")
    if isinstance(spec, ViTSpec):
        family = family_of(spec)
        arguments |= _vit_arguments(spec, kind, family)
    else:
        family = "swinv2" if isinstance(spec, SwinV2Spec) else "swin"
        arguments |= _swin_arguments(spec)
    renamed = {_their_name(name, family): tensor for name, tensor in state.items()}
    if family == "vit":
        _join_biases(renamed)
    return renamed, {"architecture": _BASES[family], "model_args": arguments}


def left_out(state: State, spec: Spec, kind: str) -> list[str]:
    """Our names that have no place in timm's models."""
    return masking_names(state, kind)


def family_of(spec: ViTSpec) -> str:
    """timm's model of a ViT: "vit" with absolute positions alone, "beit" with any other."""
    relative = spec.shared_relative_position or spec.layer_relative_position
    return "vit" if spec.absolute_position and not relative else "beit"


def _vit_arguments(spec: ViTSpec, kind: str, family: str) -> dict[str, Any]:
    if spec.norm_eps != _VIT_EPS:
        raise ValueError(f"timm's norms have an epsilon of {_VIT_EPS}, these {spec.norm_eps}")
    arguments: dict[str, Any] = {"depth": spec.depth, "num_heads": spec.num_heads}
    # fc_norm is the same there: a norm of the mean instead of the tokens
    pooled = kind == "classifier"
    arguments["global_pool"] = "avg" if pooled else "token"
    if family == "beit":
        if not pooled and not spec.final_norm:
            raise ValueError("timm's BEiT ends in a norm; this encoder has none")
        return arguments | {
            "init_values": spec.layer_scale or 0.0,  # create_model ignores None
            "use_abs_pos_emb": spec.absolute_position,
            "use_rel_pos_bias": spec.layer_relative_position,
            "use_shared_rel_pos_bias": spec.shared_relative_position,
            "use_fc_norm": not spec.final_norm,
        }
    if spec.layer_scale is not None:
        arguments["init_values"] = spec.layer_scale
    return arguments | {
        "fc_norm": pooled and not spec.final_norm,
        "final_norm": pooled or spec.final_norm,
    }


def _swin_arguments(spec: SwinSpec) -> dict[str, Any]:
    if spec.absolute_position or not spec.patch_norm:
        raise ValueError("timm's Swin has a norm after the patches, and no absolute positions")
    clamped = any(spec.window(s) != spec.window_size for s in range(len(spec.depths)))
    if clamped and spec.image_size[0] != spec.image_size[1]:
        raise ValueError("timm shrinks windows by side, we by the smaller side of a stage")
    arguments: dict[str, Any] = {
        "depths": list(spec.depths),
        "num_heads": list(spec.num_heads),
        "window_size": spec.window_size,
    }
    if isinstance(spec, SwinV2Spec):
        arguments["pretrained_window_sizes"] = list(spec.pretrained_window_sizes)
    return arguments


def _their_name(name: str, family: str) -> str:
    theirs = name.removeprefix(PREFIX)
    if family == "vit":
        return re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", theirs)
    if family == "beit":
        return theirs
    theirs = re.sub(r"^head\.", "head.fc.", theirs)
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", theirs):
        theirs = f"layers.{int(match[1]) + 1}.downsample.{match[2]}"
    return theirs


def _join_biases(state: State) -> None:
    """Join the biases of q and v to one of q, k and v, whose k is zero. Changes `state`."""
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        attention = name.removesuffix(".q_bias")
        q, v = state.pop(name), state.pop(f"{attention}.v_bias")
        state[f"{attention}.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
