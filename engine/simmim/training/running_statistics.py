"""Running statistics of batch norms over a step: of all processes, and never of a bad batch.

The forward pass updates them before anyone knows whether the step counts. They train nothing:
they are what the model normalises by when it is evaluated.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simmim.distributed import World, all_reduce_sum


def keep(model: nn.Module) -> list[Tensor]:
    """Copies of all buffers of batch norms, from before a step; [] where there are none."""
    return [torch.cat([b.flatten() for b in group]) for group in _groups(model)]


@torch.no_grad()
def settle(model: nn.Module, before: list[Tensor], finite: Tensor, world: World) -> None:
    """After a step: the mean over all processes, or what was before where the step is skipped.

    Nothing is read back.

    Args:
        model: its buffers are changed in place.
        before: what `keep` gave.
        finite: bool scalar on the device, equal in every process: whether the step counts.
        world: this process.
    """
    for group, old in zip(_groups(model), before, strict=True):
        new = torch.cat([b.flatten() for b in group])
        if world.size > 1 and new.is_floating_point():
            # equal already where batch norms are synchronised
            new = all_reduce_sum(new, world) / world.size
        new = torch.where(finite, new, old)
        parts = torch.split_with_sizes(new, [b.numel() for b in group])
        torch._foreach_copy_(group, [part.view(b.shape) for part, b in zip(parts, group)])


def _groups(model: nn.Module) -> list[list[Tensor]]:
    """Buffers of all batch norms, those of a type together."""
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                groups[buffer.dtype].append(buffer)
    return list(groups.values())
