"""Batch norm with what follows it in a residual network: the sum with the shortcut, and ReLU.

These are functions that take a norm, and not a new kind of norm: modules stay
`torch.nn.BatchNorm2d`, which `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and other tools can
replace.
B batch, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simmim.backbone.layers import scale_branch
from simmim_kernels import batch_norm_relu
from simmim_kernels.batch_norm_relu import BACKENDS
from simmim_kernels.dispatch import choose


def norm_relu(
    norm: nn.Module,
    x: Tensor,
    shortcut: Tensor | None = None,
    branch_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """relu(norm(x) · branch_scale + shortcut).

    This is one op if it has kernels (on the CPU, for maps in channels-last order) and `norm` is a
    plain batch norm in training mode; otherwise PyTorch's own operations run.

    Args:
        norm: the norm over the channels of x.
        x: [B, C, …].
        shortcut: a tensor like x; None adds nothing.
        branch_scale: factor of each image, float32 [B]; None is 1.
        backend: backend of the op; "triton", which the op does not have, means PyTorch's own.
    """
    if branch_scale is None and backend != "triton" and _fits(norm, x, shortcut):
        assert isinstance(norm, nn.BatchNorm2d)
        tensors = (x, shortcut, norm.weight, norm.bias)
        kind = "reference" if backend == "reference" else None
        if choose("batch_norm_relu", BACKENDS, tensors, kind) == "native":
            out, mean, variance = batch_norm_relu(
                x, norm.weight, norm.bias, shortcut, eps=norm.eps, backend="native"
            )
            track(norm, mean, variance, x.numel() // x.shape[1])
            return out
    branch: Tensor = scale_branch(norm(x), branch_scale)
    return F.relu(branch if shortcut is None else branch + shortcut, inplace=True)


def _fits(norm: nn.Module, x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the op gives the same for these maps, and no hook reads the norm's output."""
    if type(norm) is not nn.BatchNorm2d or not norm.training or not norm.affine:
        return False
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks:
        return False
    # the norm itself refuses a single value per channel
    if x.dim() != 4 or x.numel() <= x.shape[1] or not x.movedim(1, -1).is_contiguous():
        return False
    if shortcut is None:
        return True
    alike = (shortcut.shape, shortcut.dtype) == (x.shape, x.dtype)
    return alike and shortcut.movedim(1, -1).is_contiguous()


def track(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
    """Add a batch to a norm's running statistics, as PyTorch's batch norms do.

    Args:
        norm: the norm, whose buffers, if any, are changed in place.
        mean: mean of every channel, [C].
        variance: biased variance, [C]; the running statistics take the unbiased one.
        count: number of values of a channel.
    """
    if not norm.track_running_stats or norm.running_mean is None:
        return
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    unbiased = variance * (count / (count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
