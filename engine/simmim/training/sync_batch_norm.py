"""Batch norm with the statistics of the whole batch over all processes, also on the CPU.

PyTorch's SyncBatchNorm has no CPU kernels, and DistributedDataParallel refuses it there. On the CPU
our norm does the same through `all_reduce`, and its numbers are those of one process with the whole
batch.
B batch, C channels, N values of a channel in all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simmim.backbone.batch_norm import track


class DeviceSyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, followed by `drop` and `act` as in timm's batch norms."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, …] → the same, normalised."""
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out


class CpuSyncBatchNorm(_BatchNorm):
    """`DeviceSyncBatchNorm` for the CPU."""

    drop: nn.Module
    act: nn.Module
    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, …] → the same, normalised."""
        shared = self.training and _is_shared()
        normed = self._shared(input) if shared else super().forward(input)
        out: Tensor = self.act(self.drop(normed))
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [B, C, …], got {tuple(input.shape)}")

    def _shared(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is not None else x.new_ones(x.shape[1])
        bias = self.bias if self.bias is not None else x.new_zeros(x.shape[1])
        apply: Any = _Normalise.apply
        out: tuple[Tensor, ...] = apply(x, weight, bias, self.eps, self.process_group)
        normed, mean, variance, count = out
        track(self, mean, variance, count)
        return normed


class _Normalise(torch.autograd.Function):
    """(x - mean) / √(variance + eps) · weight + bias with statistics over all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _moments(x, group)
        if count < 2:
            raise ValueError(
                f"expected more than 1 value per channel when training, got {tuple(x.shape)}"
            )
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # the gradient for constant statistics; its sums over the batch give what the statistics add
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_weight, grad_bias]).double()
        dist.all_reduce(sums, group=ctx.group)
        of_weight, of_bias = (sums / count).to(weight.dtype)
        deviation = (variance + ctx.eps).rsqrt()
        slope = weight * deviation * deviation * of_weight
        offset = weight * deviation * of_bias - slope * mean
        shape = (1, -1, *(1,) * (x.dim() - 2))
        grad_x = grad_x - (x * slope.view(shape) + offset.view(shape)).to(grad_x.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _moments(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every channel, [C], and N, all over all processes."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    own = x.numel() // x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    variance, mean = (t.double() for t in torch.var_mean(x.to(dtype), axes, correction=0))
    # float64, because the squares of large means are subtracted again below
    sums = torch.cat([mean * own, (variance + mean.square()) * own, mean.new_tensor([own])])
    dist.all_reduce(sums, group=group)
    count = sums[-1]
    C = x.shape[1]
    mean = sums[:C] / count
    variance = (sums[C : 2 * C] / count - mean.square()).clamp(min=0)
    return mean.to(dtype), variance.to(dtype), count


def _is_shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def convert(module: nn.Module) -> nn.Module:
    """Synchronise the batch norms of `module`; parameters and buffers stay the same objects.

    Args:
        module: the module on the device where it will train. It is changed in place; only if it is
            a batch norm itself, its replacement is returned instead.

    Raises:
        ValueError: a batch norm is of a kind that does work unknown to this function.
    """
    if isinstance(module, _BatchNorm):
        known = isinstance(module, nn.SyncBatchNorm | CpuSyncBatchNorm)
        return module if known else _converted(module)
    for name, child in module.named_children():
        setattr(module, name, convert(child))
    return module


def _converted(norm: _BatchNorm) -> nn.Module:
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    extras = {name: child for name, child in norm.named_children() if name in ("drop", "act")}
    if not plain and len(extras) != 2:
        raise ValueError(
            f"a {type(norm).__name__} cannot be synchronised over processes: not a batch norm of "
            "PyTorch; train without synchronised batch norms"
        )
    on_cpu = all(t.device.type == "cpu" for t in (*norm.parameters(), *norm.buffers()))
    made = CpuSyncBatchNorm if on_cpu else DeviceSyncBatchNorm
    synchronised = made(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    synchronised._parameters.update(norm._parameters)
    synchronised._buffers.update(norm._buffers)
    for name in ("drop", "act"):
        setattr(synchronised, name, extras.get(name, nn.Identity()))
    return synchronised.train(norm.training)
