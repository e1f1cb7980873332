"""Attention inside (shifted) windows, read from and written to the feature map in place."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simmim_kernels import dispatch
from simmim_kernels.dispatch import Backend, choose, describe
from simmim_kernels.dtypes import in_float32
from simmim_kernels.op import Op
from simmim_kernels.window_attention import reference, xformers_kernel
from simmim_kernels.window_attention.arguments import Windows
from simmim_kernels.window_attention.reference import relative_position_bias

__all__ = ["BACKENDS", "relative_position_bias", "window_attention"]

# Last, so that it runs only where it is named: it was never run on a GPU by us.
BACKENDS = (*dispatch.BACKENDS, Backend("xformers", xformers_kernel.reasons_against))
COSINE_BACKENDS = (
    *dispatch.BACKENDS,
    Backend("xformers", xformers_kernel.reasons_against_cosines),
)

# The learned factor of a cosine stays below e to this; beyond it nothing is learned.
LARGEST_LOGIT_SCALE = math.log(100.0)


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head attention of every token to the tokens of its window.

    Cyclic shift, partition into windows, position bias, the mask between regions that the shift
    brought together (-100, as published), softmax and the way back are one pass: neither shifted
    copies nor probabilities are written to memory; the backward computes them again.

    Args:
        qkv: [B, H, W, 3C]; per token the heads of q, then of k, then of v. float32, bfloat16 or
            float16.
        bias: the table of relative positions [(2h-1)·(2w-1), N] as published, or the bias of every
            pair of positions [N, h·w, h·w], or None. float32 or the dtype of qkv.
        num_heads: N; divides C.
        window: side of a window in tokens, or (h, w); divides (H, W). (H, W) itself is global
            attention; [B, L, 3C] goes in as [B, 1, L, 3C] with a window of (1, L).
        shift: rows and columns of the cyclic shift; below the window's.
        scale: factor of q·k; None is 1/√(C/N).
        logit_scale: [N]; attention is then by the cosine of q and k (each divided by its length, or
            by 1e-12 if that is more) times e^min(logit_scale, log 100), and there is no `scale`.
            Scores are float32 at least, whatever the dtype of qkv.
        backend: "triton" (GPU), "native" (CPU), "reference" (PyTorch's
            scaled_dot_product_attention) or "xformers" (CUDA: memory_efficient_attention); None
            takes the first that can run.

    Returns:
        [B, H, W, C] in the dtype of qkv. Gradient (first order) flows to qkv, bias and logit_scale;
        those of the last two are summed in a fixed order.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/swin_transformer.py; cosines are those of Swin Transformer V2
        (arXiv 2111.09883), microsoft/Swin-Transformer models/swin_transformer_v2.py. The softmax
        statistics that replace saved probabilities are those of FlashAttention (arXiv 2205.14135).
    """
    window, shift = both_ways(window), both_ways(shift)

    def error(what: str) -> ValueError:
        given = describe(qkv=qkv, bias=bias, logit_scale=logit_scale, num_heads=num_heads)
        return ValueError(f"{what}: {given}, window {window}, shift {shift}")

    if qkv.dim() != 4 or num_heads < 1 or qkv.shape[3] % (3 * num_heads):
        raise error("expected qkv [B, H, W, 3C] with num_heads dividing C")
    check_window(qkv.shape[1:3], window, shift, error)
    if not qkv.dtype.is_floating_point:
        raise error("expected floating point qkv")
    if bias is not None:
        check_bias(bias, num_heads, window, error)
        if bias.device != qkv.device or bias.dtype not in (qkv.dtype, torch.float32):
            raise error("bias must be float32 or of the dtype of qkv, on its device")
    backends, factors = BACKENDS, None
    if logit_scale is not None:
        if scale is not None:
            raise error("scale and logit_scale exclude one another")
        backends, factors = COSINE_BACKENDS, cosine_factors(logit_scale, num_heads, qkv, error)
    scale = scale or (qkv.shape[3] // (3 * num_heads)) ** -0.5
    chosen = choose("window_attention", backends, (qkv, bias, factors), backend)
    bias = bias_of_kernels(bias, chosen, window)
    if chosen == "xformers":
        return xformers_kernel.window_attention(qkv, bias, num_heads, window, shift, scale)
    if chosen == "reference":
        return reference.window_attention(qkv, bias, num_heads, window, shift, scale, factors)
    bias, factors = in_float32(bias), in_float32(factors)
    return _attend(chosen, qkv, bias, factors, Windows(num_heads, window, shift, scale)).out


def plain(backend: str) -> Callable[..., Tensor]:
    """The function of a backend that is made of PyTorch's operations and differentiable itself."""
    if backend == "xformers":
        return xformers_kernel.window_attention
    return reference.window_attention


def both_ways(size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else size


def check_window(
    resolution: torch.Size,
    window: tuple[int, int],
    shift: tuple[int, int],
    error: Callable[[str], ValueError],
) -> None:
    """Raises `error` unless windows of that size and shift fit the feature map."""
    if min(window) < 1 or any(side % w for side, w in zip(resolution, window)):
        raise error("the window must divide the feature map")
    if any(not 0 <= s < w for s, w in zip(shift, window)):
        raise error("the shift must be below the window")


def check_bias(bias: Tensor, num_heads: int, window: tuple[int, int], error: Any) -> None:
    """Raises `error` unless a position bias has either of its forms."""
    h, w = window
    if bias.shape not in (((2 * h - 1) * (2 * w - 1), num_heads), (num_heads, h * w, h * w)):
        raise error("expected a bias of [(2h-1)·(2w-1), N] or [N, h·w, h·w]")


def bias_of_kernels(bias: Tensor | None, backend: str, window: tuple[int, int]) -> Tensor | None:
    """The bias of every pair [N, S, S], where the backend does not read tables by itself."""
    if bias is None or bias.dim() == 3 or backend == "triton":
        return bias
    return relative_position_bias(bias, window)


def cosine_factors(logit_scale: Tensor, num_heads: int, beside: Tensor, error: Any) -> Tensor:
    """The factor of every head's cosines, [N] in float32 at least."""
    if logit_scale.shape != (num_heads,):
        raise error("expected logit_scale [N]")
    if logit_scale.device != beside.device or logit_scale.dtype not in (
        beside.dtype,
        torch.float32,
    ):
        raise error("logit_scale must be float32 or of the dtype of qkv, on its device")
    wide = torch.promote_types(logit_scale.dtype, torch.float32)
    return logit_scale.to(wide).clamp(max=LARGEST_LOGIT_SCALE).exp()


class Attended(NamedTuple):
    """The attended values, and the logarithm of each query's sum of exponentials.

    The latter is float32 [B, H, W, N].
    """

    out: Tensor
    log_sums: Tensor


def _shapes(
    qkv: Tensor,
    bias: Tensor | None,
    factors: Tensor | None,
    windows: Windows,
) -> Attended:
    """The bias, of pairs or the table, and the factors of cosines come as float32."""
    B, H, W, C3 = qkv.shape
    log_sums = qkv.new_empty((B, H, W, windows.num_heads), dtype=torch.float32)
    return Attended(qkv.new_empty((B, H, W, C3 // 3)), log_sums)


def _gradient_shapes(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    factors: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    windows: Windows,
    of_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_bias = None
    if of_bias and bias is not None:
        grad_bias = qkv.new_empty(bias.shape, dtype=torch.float32)
    grad_factors = None if factors is None else torch.empty_like(factors)
    return qkv.new_empty(qkv.shape), grad_bias, grad_factors


_attend = Op("window_attention", _shapes, _gradient_shapes, gradients=("qkv", "bias", "factors"))
