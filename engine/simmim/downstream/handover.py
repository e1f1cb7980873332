"""Hands the weights of one model over to another, such as a classifier, or one of another size.

Weights that fit are loaded. Position tables and absolute positions of another size are remapped,
and the table that the blocks of a ViT share is copied to each of them. Anything else that does not
fit is an error: nothing is left out silently.

Source: microsoft/SimMIM utils.py (load_pretrained).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.backbone.build import Spec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.downstream.position_tables import remap_table
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.weights.load import Weights

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"encoder.rel_pos_bias.{TABLE}"

# Fields that may differ: sizes that are remapped, and those that only training uses.
_FREE = {
    "image_size",
    "window_size",
    "pretrained_window_sizes",
    "drop_path",
    "final_norm",
    "frozen_position",
    "zero_init_residual",
    "shared_relative_position",
    "layer_relative_position",
    "layer_scale",
}

# Rows of a ViT's table beyond the patch offsets: class to patch, patch to class, class to class.
_CLASS_ROWS = 3


@dataclass(frozen=True)
class Handover:
    """What became of every weight.

    Attributes:
        source: where the weights came from.
        loaded: names of the model's parameters that were taken as they are.
        remapped: name → how it was changed.
        new: names that the weights do not provide, freshly initialised.
        unused: names of the weights that the model has no place for.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    remapped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line of counts."""
        parts = [f"{len(self.loaded)} loaded"]
        parts += [f"{len(self.remapped)} remapped"] if self.remapped else []
        parts += [f"{len(self.new)} new"] if self.new else []
        parts += [f"{len(self.unused)} unused"] if self.unused else []
        return f"weights of {self.source}: {', '.join(parts)}"

    def lines(self) -> list[str]:
        """The summary, then a line for every key."""
        lines = [self.summary()]
        lines += [f"new       {name}" for name in self.new]
        lines += [f"unused    {name}" for name in self.unused]
        lines += [f"remapped  {name}: {how}" for name, how in self.remapped.items()]
        lines += [f"loaded    {name}" for name in self.loaded]
        return lines


def finetune_spec(spec: Spec, pretrained: Spec | None = None) -> Spec:
    """The architecture that a classifier has, as published.

    A ViT loses its final norm, as the classifier norms the mean. A table that its blocks shared
    becomes one table for each block, and frozen positions begin to train. A SwinV2 keeps the
    windows that it was pre-trained with, as its position bias depends on them.

    Args:
        spec: the encoder's architecture, at the size and window of fine-tuning.
        pretrained: the architecture of the weights that it will get.
    """
    if isinstance(spec, ViTSpec):
        tables = spec.shared_relative_position or spec.layer_relative_position
        return replace(
            spec,
            final_norm=False,
            frozen_position=False,
            shared_relative_position=False,
            layer_relative_position=tables,
        )
    # hand_over refuses weights of another family
    if isinstance(spec, SwinV2Spec) and isinstance(pretrained, SwinV2Spec):
        before = pretrained.pretrained_window_sizes
        if not any(before):
            before = tuple(pretrained.window(stage) for stage in range(len(pretrained.depths)))
        return replace(spec, pretrained_window_sizes=before)
    return spec


def hand_over(weights: Weights, model: ImageModel) -> Handover:
    """Put weights into a freshly built model.

    Args:
        weights: what `simmim.weights.load.read_model` returns.
        model: changed in place, unless this raises.

    Returns:
        What became of every weight.

    Raises:
        ValueError: the architectures differ, or a weight fits nowhere; names the file.
    """
    try:
        _check_architecture(weights.spec, model.encoder.spec)
        return _hand_over(weights, model)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None


def _check_architecture(source: Spec, target: Spec) -> None:
    own, wanted = asdict(source), asdict(target)
    if type(source) is not type(target):
        raise ValueError(f"holds {_describe(source)}, the model is {_describe(target)}")
    differ = [key for key in own if key not in _FREE and own[key] != wanted[key]]
    if (own.get("layer_scale") is None) != (wanted.get("layer_scale") is None):
        differ.append("layer_scale")
    if differ:
        raise ValueError(
            f"holds {_describe(source)}, the model is {_describe(target)}: "
            + ", ".join(f"{key} {own[key]} ≠ {wanted[key]}" for key in differ)
        )


def _describe(spec: Spec) -> str:
    kind = type(spec).__name__.removesuffix("Spec")
    parts = {"embed_dim": "width", "width": "width", "depth": "depth", "depths": "depth"}
    sizes = [
        f"{word} {list(value) if isinstance(value, tuple) else value}"
        for name, word in parts.items()
        if (value := getattr(spec, name, None)) is not None
    ]
    return f"a {kind} ({', '.join(sizes)})" if sizes else f"a {kind}"


def _hand_over(weights: Weights, model: ImageModel) -> Handover:
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    source, target = weights.spec, model.encoder.spec
    incoming, copied = _spread_shared_table(weights.state, own, target)
    report = Handover(weights.source)
    taken: dict[str, Tensor] = {}
    keeps_head = not isinstance(model, Classifier) or _same_classes(weights, model)
    for name, tensor in incoming.items():
        if name not in own or (name.startswith("head.") and not keeps_head):
            # the heads of another method than SimMIM have no counterpart here
            foreign = weights.kind not in ("simmim", "classifier", "encoder")
            head = foreign and not name.startswith("encoder.")
            if not head and not _may_be_unused(name, own):
                raise ValueError(f"{name} has no place in the model")
            report.unused.append(name)
            continue
        moved, how = _fitted(name, tensor, own[name], source, target)
        if moved.shape != own[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            )
        how = ", ".join(part for part in (copied.get(name, ""), how) if part)
        if how:
            report.remapped[name] = how
        else:
            report.loaded.append(name)
        taken[name] = moved
    for name in own.keys() - taken.keys():
        if not name.startswith(("head.", "fc_norm.", "decoder.")) and name != "encoder.mask_token":
            raise ValueError(f"{name} is missing")
        report.new.append(name)
    report.new.sort()
    dropped = weights.metadata.get("dropped")
    if isinstance(dropped, list):  # a file's own metadata may hold anything
        report.unused.extend(map(str, dropped))
    model.load_state_dict(own | taken)
    return report


def _same_classes(weights: Weights, model: Classifier) -> bool:
    head, names = weights.state.get("head.weight"), weights.metadata.get("classes")
    if head is None or len(head) != len(model.classes):
        return False
    return names is None or tuple(map(str, names)) == model.classes


def _may_be_unused(name: str, own: Mapping[str, Tensor]) -> bool:
    if name.startswith(("decoder.", "head.", "fc_norm.")) or name == "encoder.mask_token":
        return True
    # a classifier that norms the mean has no norm of the tokens
    return name.startswith("encoder.norm.") and "encoder.norm.weight" not in own


def _spread_shared_table(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], target: Spec
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state with a shared table copied to every block, and how each copy came about.

    The state is unchanged if it has no shared table, or if the model shares one too.
    """
    if SHARED_TABLE not in state or SHARED_TABLE in own or not isinstance(target, ViTSpec):
        return dict(state), {}
    if not target.layer_relative_position:
        raise ValueError(f"{SHARED_TABLE} has no place in the model")
    spread = {name: tensor for name, tensor in state.items() if name != SHARED_TABLE}
    copies = [f"encoder.blocks.{block}.attn.{TABLE}" for block in range(target.depth)]
    copied = {}
    for name in copies:
        # as published, a shared table replaces those that blocks have beside it
        beside = " in place of its own" if name in state else ""
        copied[name] = f"copy of the shared table{beside}"
        spread[name] = state[SHARED_TABLE]
    return spread, copied


def _fitted(
    name: str, tensor: Tensor, own: Tensor, source: Spec, target: Spec
) -> tuple[Tensor, str]:
    """A weight in the size that the model has, and how it was changed, in words ("" if not)."""
    if name.endswith(TABLE):
        before, after = _table_windows(name, source, target)
        if before == after:
            return tensor, ""
        rest = _CLASS_ROWS if isinstance(target, ViTSpec) else 0
        offsets = remap_table(tensor[: len(tensor) - rest], before, after)
        moved = torch.cat([offsets, tensor[len(tensor) - rest :]])
        return moved, f"window {_by(before)} → {_by(after)}"
    if name in ("encoder.pos_embed", "encoder.absolute_pos_embed") and source.grid != target.grid:
        kept = target.num_prefix if isinstance(target, ViTSpec) else 0  # the class token's
        moved = resize_positions(tensor[:, kept:], source.grid, target.grid)
        moved = torch.cat([tensor[:, :kept], moved], dim=1)
        return moved, f"positions {_by(source.grid)} → {_by(target.grid)}, bicubic"
    return tensor, ""


def _table_windows(name: str, source: Any, target: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    if isinstance(target, ViTSpec):
        return source.grid, target.grid
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    assert match is not None
    before, after = source.window(int(match[1])), target.window(int(match[1]))
    return (before, before), (after, after)


def resize_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Absolute positions [1, h·w, D] interpolated for another grid (bicubic), as in MAE."""
    D = positions.shape[-1]
    grid = positions.float().reshape(1, *source, D).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, -1, D).to(positions.dtype)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
