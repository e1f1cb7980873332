"""Batch norm, sum and ReLU as PyTorch has them, with statistics in float32 or wider."""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a map x [B, C, …]: the output, and mean and biased variance [C] of every channel."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(wide, others, correction=0)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    slope = (variance + eps).rsqrt() * weight
    y = (wide - mean.view(shape)) * slope.view(shape) + bias.view(shape)
    if residual is not None:
        y = y + residual
    return F.relu(y).to(x.dtype), mean.detach(), variance.detach()
