"""The layout of open-mmlab/mmpretrain: Swin pre-trained by SimMIM, and fine-tuned.

Its patch merging takes its 4C inputs channel by channel (index = channel · 4 + 2 · row + column)
where ours takes them neighbour by neighbour ((0,0), (1,0), (0,1), (1,1), C channels each): shapes
match either way, but results do not. The buffers
that its loader asks for are written.
"""

import re
from typing import Any

import torch
from torch import Tensor

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.weights.our_names import BUFFERS, Converted, State
from simmim.weights.renaming import Renaming, unknown_names

# For each neighbour of a merged cell, in mmpretrain's order (0,0), (0,1), (1,0), (1,1) of (row,
# column), its index in ours, (0,0), (1,0), (0,1), (1,1).
_NEIGHBOURS = [0, 2, 1, 3]

_INDEX = "attn.w_msa.relative_position_index"


def _renaming(last_stage: int) -> Renaming:
    block, theirs = "encoder.layers.*.blocks.*.", "backbone.stages.*.blocks.*."
    return Renaming(
        [
            ("encoder.patch_embed.proj", "backbone.patch_embed.projection"),
            ("encoder.patch_embed.norm", "backbone.patch_embed.norm"),
            ("encoder.mask_token", "backbone.mask_token"),
            ("encoder.absolute_pos_embed", "backbone.absolute_pos_embed"),
            (f"{block}norm1", f"{theirs}norm1"),
            (f"{block}norm2", f"{theirs}norm2"),
            (f"{block}attn", f"{theirs}attn.w_msa"),
            (f"{block}mlp.fc1", f"{theirs}ffn.layers.0.0"),
            (f"{block}mlp.fc2", f"{theirs}ffn.layers.1"),
            ("encoder.layers.*.downsample", "backbone.stages.*.downsample"),
            ("encoder.norm", f"backbone.norm{last_stage}"),
            ("decoder.0", "neck.decoder.0"),
            ("head", "head.fc"),
        ]
    )


def matches(state: State) -> bool:
    """Whether the names are those of mmpretrain's Swin."""
    return "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight" in state


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """The parameters under our names, in our order; see `simmim.weights.hf_layout.to_ours`."""
    stages = [int(m[1]) for name in state if (m := re.match(r"backbone\.stages\.(\d+)\.", name))]
    renaming = _renaming(max(stages))
    renamed: State = {}
    unknown = []
    for name, tensor in state.items():
        # buffers of its loss and its data preprocessing, which are no weights
        if name.endswith(BUFFERS) or name.startswith("data_"):
            continue
        ours = renaming.to_ours(name)
        if ours is None:
            unknown.append(name)
        else:
            renamed[ours] = _merged_order(tensor, to_theirs=False) if _merges(ours) else tensor
    if unknown:
        raise unknown_names(unknown)
    return Converted(renamed, {"pads_small_maps": True}, {})


def from_ours(
    state: State, spec: Spec, kind: str, metadata: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """The parameters under mmpretrain's names and in its order, and the model's settings.

    Raises:
        ValueError: mmpretrain has no model that computes the same.
    """
    if not isinstance(spec, SwinSpec) or isinstance(spec, SwinV2Spec):
        raise ValueError(
            "mmpretrain's SimMIM has Swin alone, of version 1; this is another backbone"
        )
    if not spec.patch_norm or spec.qk_scale is not None:
        raise ValueError("mmpretrain's Swin has a norm after the patch embedding, and no qk_scale")
    if kind == "simmim" and spec.channels != 3:
        raise ValueError(f"mmpretrain's decoder has 3 channels, this one {spec.channels}")
    renaming = _renaming(len(spec.depths) - 1)
    renamed: State = {}
    for name, tensor in state.items():
        theirs = renaming.to_theirs(name)
        if theirs is None:
            raise ValueError(f"mmpretrain's Swin has no place for {name}")
        renamed[theirs] = _merged_order(tensor, to_theirs=True) if _merges(name) else tensor
    for stage, depth in enumerate(spec.depths):
        index = position_index(spec.window(stage))
        for block in range(depth):
            renamed[f"backbone.stages.{stage}.blocks.{block}.{_INDEX}"] = index.clone()
    return renamed, _settings(spec, kind, state)


def left_out(state: State, spec: Spec, kind: str) -> list[str]:
    """Our names that have no place in mmpretrain's models: none."""
    return []


def _settings(spec: SwinSpec, kind: str, state: State) -> dict[str, Any]:
    """The model as mmpretrain's configuration files describe it."""
    backbone = _backbone(spec, masked="encoder.mask_token" in state)
    features = spec.embed_dim << (len(spec.depths) - 1)
    if kind == "simmim":
        loss = {"type": "PixelReconstructionLoss", "criterion": "L1", "channel": spec.channels}
        decoder = {"in_channels": features, "encoder_stride": spec.stride}
        return {
            "type": "SimMIM",
            "backbone": backbone,
            "neck": {"type": "SimMIMLinearDecoder", **decoder},
            "head": {"type": "SimMIMHead", "patch_size": spec.patch_size, "loss": loss},
        }
    settings: dict[str, Any] = {
        "type": "ImageClassifier",
        "backbone": backbone,
        "neck": {"type": "GlobalAveragePooling"},
    }
    if kind == "classifier":
        classes = {"num_classes": len(state["head.weight"]), "in_channels": features}
        settings["head"] = {"type": "LinearClsHead", **classes}
    return settings


def _backbone(spec: SwinSpec, masked: bool) -> dict[str, Any]:
    attention: dict[str, Any] = {"qkv_bias": spec.qkv_bias}
    block = {"ffn_ratio": spec.mlp_ratio, "attn_cfgs": attention}
    return {
        "type": "SimMIMSwinTransformer" if masked else "SwinTransformer",
        "arch": {
            "embed_dims": spec.embed_dim,
            "depths": list(spec.depths),
            "num_heads": list(spec.num_heads),
        },
        "img_size": list(spec.image_size),
        "in_channels": spec.channels,
        "patch_cfg": {"kernel_size": spec.patch_size, "stride": spec.patch_size},
        "out_indices": [len(spec.depths) - 1],
        "drop_path_rate": spec.drop_path,
        "use_abs_pos_embed": spec.absolute_position,
        # mmpretrain does not shrink windows by itself, so each stage gets its own size
        "stage_cfgs": [
            {"window_size": spec.window(stage), "block_cfgs": block}
            for stage in range(len(spec.depths))
        ],
    }


def _merges(name: str) -> bool:
    return re.fullmatch(r"encoder\.layers\.\d+\.downsample\..+", name) is not None


def _merged_order(tensor: Tensor, to_theirs: bool) -> Tensor:
    """Reorder the last dimension, 4C, of a merging's weight or norm; a pure permutation."""
    channels = tensor.shape[-1] // 4
    order = torch.arange(4 * channels).view(4, channels)[_NEIGHBOURS].t().reshape(-1)
    if not to_theirs:
        order = order.argsort()
    return tensor[..., order.to(tensor.device)].contiguous()


def position_index(window: int) -> Tensor:
    """Row of the position table for every pair of tokens of a window, int64 [w², w²]."""
    place = torch.arange(window)
    row, column = (axis.reshape(-1) for axis in torch.meshgrid(place, place, indexing="ij"))
    rows = row[:, None] - row[None, :] + window - 1
    return rows * (2 * window - 1) + column[:, None] - column[None, :] + window - 1
