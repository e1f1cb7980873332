"""Patch merging on a GPU: matrix products by torch, one Triton pass before or after them.

B batch, H W token rows and columns, C width, M width of the output, T rows of four neighbours; R
rows and K channels of a tile [R, 4, K]. Arithmetic is float32 in registers. Sums over rows take two
steps, as in transformer_block/triton_rows.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.merge_patches.arguments import MergeParameters, Statistics
from simmim_kernels.transformer_block import triton_rows
from simmim_kernels.triton_launch import cdiv, kernel


@triton.jit
def _tile(i_row, rows, columns, C, R: tl.constexpr, K: tl.constexpr):
    """Where the neighbours of rows i_row to i_row + R lie in x, and the rows in y; the mask."""
    o_row = i_row + tl.arange(0, R)
    o_neighbour, o_channel = tl.arange(0, 4), tl.arange(0, K)
    # tokens are counted from the first of the batch: H is even, so images need no index
    o_first = (o_row // columns).to(tl.int64) * (4 * columns) + o_row % columns * 2
    o_step = o_neighbour % 2 * (2 * columns) + o_neighbour // 2
    o_token = o_first[:, None] + o_step[None, :]
    o_piece = o_row[:, None].to(tl.int64) * 4 + o_neighbour[None, :]
    m_row = o_row < rows
    m_tile = m_row[:, None, None] & (o_channel < C)[None, None, :]
    o_x = o_token[:, :, None] * C + o_channel[None, None, :]
    o_y = o_piece[:, :, None] * C + o_channel[None, None, :]
    return o_row, m_row, o_x, o_y, m_tile


@triton.jit
def _columns(C, K: tl.constexpr):
    o_neighbour, o_channel = tl.arange(0, 4), tl.arange(0, K)
    o_column = o_neighbour[:, None] * C + o_channel[None, :]
    return o_column, (o_channel < C)[None, :]


@triton.jit
def _row_mean(b_tile, C):
    return (tl.sum(tl.sum(b_tile, axis=2), axis=1) / (4 * C))[:, None, None]


@kernel
@triton.jit
def _merge_patches(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_mean,
    p_rstd,
    rows,
    columns,
    C,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_row, m_row, o_x, o_y, m_tile = _tile(tl.program_id(0) * R, rows, columns, C, R, K)
    o_column, m_column = _columns(C, K)
    b_x = tl.load(p_x + o_x, mask=m_tile, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_column, mask=m_column, other=0.0)
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    mean = _row_mean(b_x, C)
    # deviations from the mean: a difference of sums would cancel where the mean is large
    b_x = tl.where(m_tile, b_x - mean, 0.0)
    rstd = tl.rsqrt(_row_mean(b_x * b_x, C) + eps)
    b_y = b_x * rstd * weight[None, :, :] + bias[None, :, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_tile)
    tl.store(p_mean + o_row, tl.reshape(mean, (R,)), mask=m_row)
    tl.store(p_rstd + o_row, tl.reshape(rstd, (R,)), mask=m_row)


@kernel
@triton.jit
def _merge_patches_backward(
    p_dy,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_dx,
    p_partial,
    rows,
    rows_per_program,
    columns,
    C,
    OF_PARAMETERS: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_column, m_column = _columns(C, K)
    weight = tl.load(p_weight + o_column, mask=m_column, other=0.0)
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    b_weight = tl.zeros((R, 4, K), dtype=tl.float32)
    b_bias = tl.zeros((R, 4, K), dtype=tl.float32)
    for start in range(0, rows_per_program, R):
        i_row = tl.program_id(0) * rows_per_program + start
        o_row, m_row, o_x, o_y, m_tile = _tile(i_row, rows, columns, C, R, K)
        b_x = tl.load(p_x + o_x, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_y, mask=m_tile, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + o_row, mask=m_row, other=0.0)[:, None, None]
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None, None]
        b_x = (b_x - mean) * rstd
        if OF_PARAMETERS:
            # the input of the product whose weight gradient comes next takes the place of dy
            b_y = b_x * weight[None, :, :] + bias[None, :, :]
            tl.store(p_dy + o_y, b_y.to(p_dy.dtype.element_ty), mask=m_tile)
            b_weight += b_dy * b_x
            b_bias += b_dy
        # beyond the width dy is 0, and so are its products
        b_dy *= weight[None, :, :]
        shift = _row_mean(b_dy, C)
        slope = _row_mean(b_dy * b_x, C)
        b_dx = (b_dy - shift - b_x * slope) * rstd
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_tile)
    if OF_PARAMETERS:
        size = tl.num_programs(0).to(tl.int64) * 4 * C
        o_partial = tl.program_id(0).to(tl.int64) * 4 * C + o_column
        tl.store(p_partial + o_partial, tl.sum(b_weight, axis=0), mask=m_column)
        tl.store(p_partial + size + o_partial, tl.sum(b_bias, axis=0), mask=m_column)


def forward(x: Tensor, parameters: MergeParameters, eps: float) -> tuple[Tensor, Statistics]:
    """The output and what is kept; all inputs contiguous."""
    norm_weight, norm_bias, weight = parameters
    B, H, W, _ = x.shape
    y, *norm = gather(x, norm_weight, norm_bias, eps)
    out = triton_rows.forward_product(y, weight).view(B, H // 2, W // 2, len(weight))
    return out, Statistics(*norm)


def backward(
    grad_out: Tensor, x: Tensor, parameters: MergeParameters, norm: Statistics, of_parameters: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the parameters, None where it is not wanted."""
    norm_weight, norm_bias, weight = parameters
    grad_rows = grad_out.view(norm.mean.numel(), len(weight))
    dy = triton_rows.backward_product(grad_rows, weight)
    dx, *of_norm = scatter(dy, x, *norm, norm_weight, norm_bias, of_parameters)
    y = dy  # whose place it took
    grad_weight = triton_rows.weight_gradient(grad_rows, y, weight) if of_parameters else None
    return dx, *of_norm, grad_weight


def gather(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows [T, 4C] of four neighbours each, and the mean and rstd of each row."""
    B, H, W, C = x.shape
    T = B * (H // 2) * (W // 2)
    y = x.new_empty((T, 4 * C))
    mean, rstd = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
    if T:
        R, K, num_warps = triton_rows.whole_rows(4 * C, 16)
        _merge_patches[(cdiv(T, R),)](
            x, weight, bias, y, mean, rstd, T, W // 2, C, eps, R=R, K=K // 4, num_warps=num_warps
        )
    return y, mean, rstd


def scatter(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    of_parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from dy [T, 4C], that of `gather`'s rows.

    With `of_parameters` the rows take the place of dy; without, the last two are None.
    """
    T, C, columns = mean.numel(), x.shape[3], x.shape[2] // 2
    dx = x.new_empty(x.shape)
    R, K, num_warps = triton_rows.whole_rows(4 * C, 8)
    per_program = triton_rows.rows_per_program(T, 1)
    programs = cdiv(T, per_program)
    partial = x.new_empty((2, programs, 4 * C) if of_parameters else 0, dtype=torch.float32)
    if T:
        _merge_patches_backward[(programs,)](
            dy,
            x,
            mean,
            rstd,
            weight,
            bias,
            dx,
            partial,
            T,
            per_program,
            columns,
            C,
            OF_PARAMETERS=of_parameters,
            R=R,
            K=K // 4,
            num_warps=num_warps,
        )
    if not of_parameters:
        return dx, None, None
    grad_weight, grad_bias = triton_rows.added(partial)
    return dx, grad_weight, grad_bias
