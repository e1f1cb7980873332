"""Batch norm, sum and ReLU as PyTorch has them, with statistics in float32 or wider."""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows x [N, C]: the output, and the mean and biased variance [C] of every channel."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, 0, correction=0)
    y = (wide - mean) * (variance + eps).rsqrt() * weight + bias
    if residual is not None:
        y = y + residual
    return F.relu(y).to(x.dtype), mean.detach(), variance.detach()
