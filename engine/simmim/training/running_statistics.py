"""Running statistics of batch norms: averaged over processes, and unchanged by a skipped step.

The forward pass updates them before it is known whether the step counts. Training does not use
them: the model normalises by them when it is evaluated.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simmim.distributed import World, all_reduce_sum


def keep(model: nn.Module) -> list[Tensor]:
    """Copy the buffers of all batch norms, before a step; [] if there are none."""
    return [torch.cat([b.flatten() for b in group]) for group in _groups(model)]


@torch.no_grad()
def settle(model: nn.Module, before: list[Tensor], finite: Tensor, world: World) -> None:
    """Set buffers after a step to the mean over all processes, or back if the step is skipped.

    Nothing is read back to the host.

    Args:
        model: the model, whose buffers are changed in place.
        before: the copies that `keep` made.
        finite: bool scalar on the device, equal in every process: whether the step counts.
        world: this process.
    """
    for group, old in zip(_groups(model), before, strict=True):
        new = torch.cat([b.flatten() for b in group])
        if world.size > 1 and new.is_floating_point():
            # already equal if batch norms are synchronised
            new = all_reduce_sum(new, world) / world.size
        new = torch.where(finite, new, old)
        parts = torch.split_with_sizes(new, [b.numel() for b in group])
        torch._foreach_copy_(group, [part.view(b.shape) for part, b in zip(parts, group)])


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the images of a batch influence one another."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _groups(model: nn.Module) -> list[list[Tensor]]:
    """The buffers of all batch norms, grouped by dtype."""
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                groups[buffer.dtype].append(buffer)
    return list(groups.values())
