"""Patch merging on the CPU: PyTorch's matrix products, one C++ pass before or after them.

T rows of four neighbours, M width of the output. Products run in the dtype of the weight, which is
float32 where the processor has no 16-bit products.
"""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.merge_patches.arguments import MergeParameters, Statistics
from simmim_kernels.native import converted, multiply, rows_and_dtypes


def forward(x: Tensor, parameters: MergeParameters, eps: float) -> tuple[Tensor, Statistics]:
    """The output and what is kept; all inputs contiguous."""
    assert native.extension is not None
    norm_weight, norm_bias, weight = parameters
    B, H, W, _ = x.shape
    M, width = weight.shape
    y = native.empty((B * (H // 2) * (W // 2), width), weight.dtype)
    mean, rstd = torch.empty(len(y)), torch.empty(len(y))
    native.extension.merge_patches_forward(
        rows_and_dtypes(y, x.dtype),
        W // 2,
        x.data_ptr(),
        norm_weight.data_ptr(),
        norm_bias.data_ptr(),
        eps,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    out = native.empty((B, H // 2, W // 2, M), weight.dtype)
    multiply(y, weight.t(), out=out.view(len(y), M))
    return converted(out, x.dtype), Statistics(mean, rstd)


def backward(
    grad_out: Tensor, x: Tensor, parameters: MergeParameters, norm: Statistics, of_parameters: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the parameters, None where it is not wanted."""
    assert native.extension is not None
    norm_weight, norm_bias, weight = parameters
    M, width = weight.shape
    grad_out = converted(grad_out, weight.dtype).view(len(norm.mean), M)
    grad_y = multiply(grad_out, weight)
    grad_x = native.empty(x.shape, x.dtype)
    grad_norm_weight = torch.zeros(width if of_parameters else 0)
    grad_norm_bias = torch.zeros_like(grad_norm_weight)
    native.extension.merge_patches_backward(
        rows_and_dtypes(grad_y, x.dtype),
        x.shape[2] // 2,
        x.data_ptr(),
        norm_weight.data_ptr(),
        norm_bias.data_ptr(),
        norm.mean.data_ptr(),
        norm.rstd.data_ptr(),
        grad_y.data_ptr(),
        grad_x.data_ptr(),
        grad_norm_weight.data_ptr(),
        grad_norm_bias.data_ptr(),
    )
    y = grad_y  # whose place it took
    grad_weight = multiply(grad_out.t(), y) if of_parameters else None
    return grad_x, grad_norm_weight, grad_norm_bias, grad_weight
