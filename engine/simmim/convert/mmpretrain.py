"""The layout of open-mmlab/mmpretrain: Swin pre-trained by SimMIM, and fine-tuned.

Its patch merging takes its 4C inputs channel by channel (index = channel · 4 + 2 · row + column)
where ours takes them neighbour by neighbour ((0,0), (1,0), (0,1), (1,1), C channels each): shapes
match either way, results do not. Buffers that its loader asks for are written.
"""

import re
from typing import Any

import torch
from torch import Tensor

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.convert.renaming import Renaming, State, unknown_names

# Our neighbours of a merged cell, (row, column) in the order (0,0), (1,0), (0,1), (1,1), by theirs.
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


def to_ours(state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any], dict[str, Any]]:
    """Our names and channel order for theirs; see `simmim.convert.hf.to_ours`."""
    stages = [int(m[1]) for name in state if (m := re.match(r"backbone\.stages\.(\d+)\.", name))]
    renaming = _renaming(max(stages))
    found: State = {}
    unknown = []
    for name, tensor in state.items():
        # of its losses and data preprocessing
        if name.endswith(("relative_position_index", "attn_mask")) or name.startswith("data_"):
            continue
        ours = renaming.to_ours(name)
        if ours is None:
            unknown.append(name)
        else:
            found[ours] = _merged_order(tensor, to_theirs=False) if _merges(ours) else tensor
    if unknown:
        raise unknown_names(unknown)
    return found, {}, {}


def from_ours(
    state: State, spec: Spec, kind: str, metadata: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """Their names and channel order for ours, and the settings of their Swin.

    Raises:
        ValueError: they have no model that computes the same.
    """
    if not isinstance(spec, SwinSpec):
        raise ValueError("mmpretrain's SimMIM has Swin alone; this is another backbone")
    if not spec.patch_norm or spec.qk_scale is not None:
        raise ValueError("mmpretrain's Swin has a norm after the patch embedding, and no qk_scale")
    renaming = _renaming(len(spec.depths) - 1)
    found: State = {}
    for name, tensor in state.items():
        theirs = renaming.to_theirs(name)
        if theirs is None:
            raise ValueError(f"mmpretrain's Swin has no place for {name}")
        found[theirs] = _merged_order(tensor, to_theirs=True) if _merges(name) else tensor
    for stage, depth in enumerate(spec.depths):
        index = position_index(spec.window(stage))
        for block in range(depth):
            found[f"backbone.stages.{stage}.blocks.{block}.{_INDEX}"] = index.clone()
    windows = [spec.window(stage) for stage in range(len(spec.depths))]
    settings = {
        "type": "SimMIMSwinTransformer" if kind == "simmim" else "SwinTransformer",
        "arch": {
            "embed_dims": spec.embed_dim,
            "depths": list(spec.depths),
            "num_heads": list(spec.num_heads),
        },
        "img_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        # a window that a small stage shrinks must be given for each stage there
        "window_size": windows[0] if len(set(windows)) == 1 else windows,
        "drop_path_rate": spec.drop_path,
        "use_abs_pos_embed": spec.absolute_position,
    }
    return found, settings


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
