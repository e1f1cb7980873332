"""Calls the C++ kernels of batch_norm_relu. Maps [B, C, …] lie in channels-last order."""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.native import address


def reasons_against(
    x: Tensor | None, residual: Tensor | None = None, *parameters: Tensor | None
) -> list[str]:
    """Why the kernels cannot take these tensors; empty when they can."""
    reasons = native.reasons_against(x, residual, *parameters)
    for map_ in (x, residual):
        if map_ is not None and map_.dim() > 2 and not map_.movedim(1, -1).is_contiguous():
            return [*reasons, "it takes maps in channels-last order"]
    return reasons


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and mean and biased variance [C]; vectors are contiguous."""
    assert native.extension is not None
    out = native.empty_channels_last(x.shape, x.dtype)
    mean, variance = torch.empty_like(weight), torch.empty_like(weight)
    native.extension.batch_norm_relu_forward(
        _shape(x),
        x.data_ptr(),
        address(residual),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        mean.data_ptr(),
        variance.data_ptr(),
        out.data_ptr(),
    )
    return out, mean, variance


def backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; that of residual [0] where `out` is None."""
    assert native.extension is not None
    grad_x = native.empty_channels_last(x.shape, x.dtype)
    grad_residual = x.new_empty(0) if out is None else native.empty_channels_last(x.shape, x.dtype)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    native.extension.batch_norm_relu_backward(
        _shape(x),
        grad_out.data_ptr(),
        x.data_ptr(),
        address(out),
        weight.data_ptr(),
        bias.data_ptr(),
        mean.data_ptr(),
        variance.data_ptr(),
        eps,
        grad_x.data_ptr(),
        grad_residual.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
    )
    return grad_x, grad_weight, grad_bias, grad_residual


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    channels = x.shape[1]
    return x.numel() // channels, channels, native.DTYPE_CODES[x.dtype], torch.get_num_threads()
