"""The layouts of timm: Swin and SwinV2, and BEiT for a ViT; its plain ViT is read as an encoder.

timm's Swin has the published names, with the merging at the start of the next stage, `head.fc` for
the head, and neither mask token nor decoder. Its BEiT has those of the published fine-tuned ViT.
"""

import re
from typing import Any

from simmim.backbone.build import Spec
from simmim.backbone.vit import ViTSpec
from simmim.convert.official import PREFIX
from simmim.convert.renaming import State

# timm's models that take every size as an argument.
_BASES = {
    "swin": "swin_base_patch4_window7_224",
    "swinv2": "swinv2_base_window8_256",
    "vit": "beit_base_patch16_224",
}


def matches(state: State) -> bool:
    """Whether the names are those of timm's Swin, or of its plain ViT."""
    return "patch_embed.proj.weight" in state and (
        "layers.0.blocks.0.attn.qkv.weight" in state or "blocks.0.attn.qkv.weight" in state
    )


def to_ours(state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any], dict[str, Any]]:
    """Our names for theirs; see `simmim.convert.hf.to_ours`."""
    if "blocks.0.attn.qkv.weight" in state:
        return _plain_vit_to_ours(state)
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(("relative_position_index", "attn_mask", "relative_coords_table")):
            continue
        if name.startswith("head.fc."):
            found[name.replace("head.fc.", "head.")] = tensor
        elif match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
            found[f"{PREFIX}layers.{int(match[1]) - 1}.downsample.{match[2]}"] = tensor
        else:
            found[PREFIX + name] = tensor
    return found, {}, {}


def _plain_vit_to_ours(state: State) -> tuple[State, dict[str, Any], dict[str, Any]]:
    found: State = {}
    dropped = []
    for name, tensor in state.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.qkv\.bias", name):
            q, _, v = tensor.chunk(3)  # a key bias cancels in the softmax
            found[f"{PREFIX}{match[1]}.q_bias"] = q.clone()
            found[f"{PREFIX}{match[1]}.v_bias"] = v.clone()
        elif match := re.fullmatch(r"(blocks\.\d+)\.ls([12])\.gamma", name):
            found[f"{PREFIX}{match[1]}.gamma_{match[2]}"] = tensor
        elif name.startswith(("head.", "fc_norm.")):
            dropped.append(name)  # it reads the class token, or a norm after the mean
        else:
            found[PREFIX + name] = tensor
    return found, {}, {"dropped": dropped}


def from_ours(
    state: State, spec: Spec, kind: str, metadata: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """Their names for ours, and what `timm.create_model` needs to build the model.

    Mask token and decoder have no place there and are left out.

    Raises:
        ValueError: they have no model that computes the same.
    """
    family = "vit" if isinstance(spec, ViTSpec) else "swin"
    if type(spec).__name__ == "SwinV2Spec":
        family = "swinv2"
    arguments: dict[str, Any] = {
        "img_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "embed_dim": spec.embed_dim,
        "mlp_ratio": spec.mlp_ratio,
        "drop_path_rate": spec.drop_path,
        "num_classes": len(state["head.weight"]) if kind == "classifier" else 0,
    }
    if getattr(spec, "qk_scale", None) is not None:
        raise ValueError("timm has no factor of q·k other than 1/√(head width)")
    if isinstance(spec, ViTSpec):
        if kind != "classifier" and not spec.final_norm:
            raise ValueError("timm's BEiT ends in a norm; this encoder has none")
        if kind == "classifier" and spec.final_norm:
            raise ValueError(
                "timm's BEiT reads the norm of the mean; this one the mean of normalised tokens"
            )
        arguments |= {
            "depth": spec.depth,
            "num_heads": spec.num_heads,
            "qkv_bias": spec.qkv_bias,
            "init_values": spec.layer_scale or 0.0,  # create_model passes over None
            "use_abs_pos_emb": spec.absolute_position,
            "use_rel_pos_bias": spec.layer_relative_position,
            "use_shared_rel_pos_bias": spec.shared_relative_position,
            "global_pool": "token" if spec.final_norm else "avg",
        }
    else:
        if spec.absolute_position or not spec.patch_norm:
            raise ValueError("timm's Swin has a norm after the patches, and no absolute positions")
        clamped = any(spec.window(s) != spec.window_size for s in range(len(spec.depths)))
        if clamped and spec.image_size[0] != spec.image_size[1]:
            raise ValueError("timm shrinks windows by side, we by the smaller side of a stage")
        arguments |= {
            "depths": list(spec.depths),
            "num_heads": list(spec.num_heads),
            "window_size": spec.window_size,
            "qkv_bias": spec.qkv_bias,
        }
        if family == "swinv2":
            arguments["pretrained_window_sizes"] = list(getattr(spec, "pretrained_window_sizes"))  # noqa: B009
    found: State = {}
    for name, tensor in state.items():
        if name.startswith("decoder.") or name == f"{PREFIX}mask_token":
            continue
        theirs = name.removeprefix(PREFIX)
        if family != "vit":
            theirs = re.sub(r"^head\.", "head.fc.", theirs)
            if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", theirs):
                theirs = f"layers.{int(match[1]) + 1}.downsample.{match[2]}"
        found[theirs] = tensor
    return found, {"architecture": _BASES[family], "model_args": arguments}
