"""Calls the C++ kernels of window_attention with the addresses of contiguous tensors."""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.window_attention.arguments import Windows


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    windows: Windows,
    qkv_bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attended values [B, H, W, C] and log_sums float32 [B, H, W, N].

    `qkv_bias`, float32 [3C], is added to every token of qkv as it is read; `factors`, float32 [N],
    are those of the cosines of q and k, which then take the place of scale · q·k.
    """
    assert native.extension is not None
    B, H, W, C3 = qkv.shape
    out = native.empty((B, H, W, C3 // 3), qkv.dtype)
    log_sums = native.empty((B, H, W, windows.num_heads), torch.float32)
    native.extension.window_attention_forward(
        *_shared(qkv, qkv_bias, bias, factors, windows),
        out.data_ptr(),
        log_sums.data_ptr(),
    )
    return out, log_sums


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    windows: Windows,
    of_bias: bool,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, of the factors and, if wanted, of the bias: (qkv, bias, factors)."""
    grad_qkv, _, grad_bias, grad_factors = backward_with_bias(
        grad_out, qkv, None, bias, log_sums, windows, of_bias, factors
    )
    return grad_qkv, grad_bias, grad_factors


def backward_with_bias(
    grad_out: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    log_sums: Tensor,
    windows: Windows,
    of_bias: bool,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv (in the dtype of grad_out: float32 or that of qkv), qkv_bias, bias, factors.

    Those of the biases are float32, [0] unless `of_bias` and the bias is there; that of the
    factors is float32, [0] unless they are there.
    """
    assert native.extension is not None
    grad_qkv = native.empty(qkv.shape, grad_out.dtype)
    num_heads, window, _, _ = windows
    pairs = window[0] * window[1] if of_bias and bias is not None else 0
    grad_bias = torch.zeros((num_heads, pairs, pairs) if pairs else (0,))
    grad_qkv_bias = torch.zeros(qkv.shape[-1] if of_bias and qkv_bias is not None else 0)
    grad_factors = torch.zeros(0 if factors is None else num_heads)
    native.extension.window_attention_backward(
        *_shared(qkv, qkv_bias, bias, factors, windows),
        grad_out.data_ptr(),
        log_sums.data_ptr(),
        grad_qkv.data_ptr(),
        grad_qkv_bias.data_ptr(),
        grad_bias.data_ptr(),
        grad_factors.data_ptr(),
        native.DTYPE_CODES[grad_out.dtype],
    )
    return grad_qkv, grad_qkv_bias, grad_bias, grad_factors


def _shared(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    windows: Windows,
) -> tuple[object, ...]:
    B, H, W, C3 = qkv.shape
    num_heads, window, shift, scale = windows
    return (
        qkv.data_ptr(),
        native.address(qkv_bias),
        native.address(bias),
        native.address(factors),
        (B, H, W, C3 // 3, num_heads),
        window,
        shift,
        scale,
        native.DTYPE_CODES[qkv.dtype],
        torch.get_num_threads(),
    )
