"""The norms of a transformer block and what is added beside them, in Triton: one pass each way.

T tokens, C width; R rows and K columns of a tile, as wide as a row. Arithmetic is float32 in
registers; sums over tokens take the two steps of triton_rows.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.transformer_block.triton_rows import rows_per_program, whole_rows
from simmim_kernels.triton_launch import cdiv, kernel


@kernel
@triton.jit
def _layer_norm(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_mean,
    p_rstd,
    rows,
    C,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_column = tl.arange(0, K)
    m_row, m_column = o_row < rows, o_column < C
    m_tile = m_row[:, None] & m_column[None, :]
    o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_column, mask=m_column, other=0.0)
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    mean = tl.sum(b_x, axis=1) / C
    # deviations from the mean: a difference of sums would cancel where the mean is large
    b_x = tl.where(m_tile, b_x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + eps)
    b_y = b_x * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(p_y + o_tile, b_y.to(p_y.dtype.element_ty), mask=m_tile)
    tl.store(p_mean + o_row, mean, mask=m_row)
    tl.store(p_rstd + o_row, rstd, mask=m_row)


@kernel
@triton.jit
def _layer_norm_backward(
    p_grad_out,
    p_dy,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_branch_scale,
    p_unit,
    p_dx,
    p_partial,
    rows,
    rows_per_program,
    tokens_per_image,
    C,
    HAS_BRANCH_SCALE: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    OF_PARAMETERS: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_column = tl.arange(0, K)
    m_column = o_column < C
    weight = tl.load(p_weight + o_column, mask=m_column, other=0.0)
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    b_weight = tl.zeros((R, K), dtype=tl.float32)
    b_bias = tl.zeros((R, K), dtype=tl.float32)
    b_branch = tl.zeros((R, K), dtype=tl.float32)
    for start in range(0, rows_per_program, R):
        o_row = tl.program_id(0) * rows_per_program + start + tl.arange(0, R)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
        b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + o_row, mask=m_row, other=0.0)
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)
        b_x = (b_x - mean[:, None]) * rstd[:, None]
        if HAS_UNIT:
            b_dy *= tl.load(p_unit)
        if OF_PARAMETERS:
            # the input of the product whose weight gradient comes next takes the place of dy
            b_y = b_x * weight[None, :] + bias[None, :]
            tl.store(p_dy + o_tile, b_y.to(p_dy.dtype.element_ty), mask=m_tile)
            b_weight += b_dy * b_x
            b_bias += b_dy
            if HAS_BRANCH_SCALE:
                o_image = o_row // tokens_per_image
                branch_scale = tl.load(p_branch_scale + o_image, mask=m_row, other=0.0)
                b_branch += b_grad * branch_scale[:, None]
            else:
                b_branch += b_grad
        # beyond the width dy is 0, and so are its products
        b_dy *= weight[None, :]
        shift = tl.sum(b_dy, axis=1) / C
        slope = tl.sum(b_dy * b_x, axis=1) / C
        b_dx = b_grad + (b_dy - shift[:, None] - b_x * slope[:, None]) * rstd[:, None]
        tl.store(p_dx + o_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_tile)
    if OF_PARAMETERS:
        size = tl.num_programs(0).to(tl.int64) * C
        o_partial = tl.program_id(0).to(tl.int64) * C + o_column
        tl.store(p_partial + o_partial, tl.sum(b_weight, axis=0), mask=m_column)
        tl.store(p_partial + size + o_partial, tl.sum(b_bias, axis=0), mask=m_column)
        tl.store(p_partial + 2 * size + o_partial, tl.sum(b_branch, axis=0), mask=m_column)


@kernel
@triton.jit
def _add_normalised(
    p_branch,
    p_x,
    p_bias,
    p_weight,
    p_norm_bias,
    p_branch_scale,
    p_out,
    p_mean,
    p_rstd,
    rows,
    tokens_per_image,
    C,
    eps,
    HAS_BRANCH_SCALE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_column = tl.arange(0, K)
    m_row, m_column = o_row < rows, o_column < C
    m_tile = m_row[:, None] & m_column[None, :]
    o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    b_y = tl.load(p_branch + o_tile, mask=m_tile, other=0.0).to(tl.float32) + bias[None, :]
    mean = tl.sum(b_y, axis=1) / C
    # deviations from the mean: a difference of sums would cancel where the mean is large
    b_y = tl.where(m_tile, b_y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(b_y * b_y, axis=1) / C + eps)
    weight = tl.load(p_weight + o_column, mask=m_column, other=0.0)
    norm_bias = tl.load(p_norm_bias + o_column, mask=m_column, other=0.0)
    b_y = b_y * rstd[:, None] * weight[None, :] + norm_bias[None, :]
    if HAS_BRANCH_SCALE:
        o_image = o_row // tokens_per_image
        b_y *= tl.load(p_branch_scale + o_image, mask=m_row, other=0.0)[:, None]
    b_out = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32) + b_y
    tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_mean + o_row, mean, mask=m_row)
    tl.store(p_rstd + o_row, rstd, mask=m_row)


@kernel
@triton.jit
def _add_normalised_backward(
    p_grad_out,
    p_branch,
    p_mean,
    p_rstd,
    p_bias,
    p_weight,
    p_branch_scale,
    p_grad,
    p_partial,
    rows,
    rows_per_program,
    tokens_per_image,
    C,
    HAS_BRANCH_SCALE: tl.constexpr,
    OF_PARAMETERS: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_column = tl.arange(0, K)
    m_column = o_column < C
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    weight = tl.load(p_weight + o_column, mask=m_column, other=0.0)
    b_bias = tl.zeros((R, K), dtype=tl.float32)
    b_weight = tl.zeros((R, K), dtype=tl.float32)
    b_norm_bias = tl.zeros((R, K), dtype=tl.float32)
    for start in range(0, rows_per_program, R):
        o_row = tl.program_id(0) * rows_per_program + start + tl.arange(0, R)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
        b_grad = tl.load(p_grad_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        if HAS_BRANCH_SCALE:
            o_image = o_row // tokens_per_image
            b_grad *= tl.load(p_branch_scale + o_image, mask=m_row, other=0.0)[:, None]
        b_y = tl.load(p_branch + o_tile, mask=m_tile, other=0.0).to(tl.float32) + bias[None, :]
        mean = tl.load(p_mean + o_row, mask=m_row, other=0.0)
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)
        b_y = (b_y - mean[:, None]) * rstd[:, None]
        if OF_PARAMETERS:
            b_weight += b_grad * b_y
            b_norm_bias += b_grad
        # beyond the width the gradient is 0, and so are its products
        b_grad *= weight[None, :]
        shift = tl.sum(b_grad, axis=1) / C
        slope = tl.sum(b_grad * b_y, axis=1) / C
        b_grad = (b_grad - shift[:, None] - b_y * slope[:, None]) * rstd[:, None]
        tl.store(p_grad + o_tile, b_grad.to(p_grad.dtype.element_ty), mask=m_tile)
        if OF_PARAMETERS:
            b_bias += b_grad
    if OF_PARAMETERS:
        size = tl.num_programs(0).to(tl.int64) * C
        o_partial = tl.program_id(0).to(tl.int64) * C + o_column
        tl.store(p_partial + o_partial, tl.sum(b_bias, axis=0), mask=m_column)
        tl.store(p_partial + size + o_partial, tl.sum(b_weight, axis=0), mask=m_column)
        tl.store(p_partial + 2 * size + o_partial, tl.sum(b_norm_bias, axis=0), mask=m_column)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows of x [T, C], and the mean and reciprocal deviation of each."""
    T, C = x.shape
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
    if T:
        R, K, num_warps = whole_rows(C, 16)
        _layer_norm[(cdiv(T, R),)](
            x, weight, bias, y, mean, rstd, T, C, eps, R=R, K=K, num_warps=num_warps
        )
    return y, mean, rstd


def layer_norm_backward(
    grad_out: Tensor,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    unit: Tensor | None,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, to which grad_out goes both directly and by the branch.

    Args:
        grad_out: [T, C], gradient of the block's output.
        dy: [T, C], gradient of the normalised rows; with `of_parameters` these take its place.
        x: [T, C], with its statistics mean and rstd.
        mean: [T].
        rstd: [T].
        weight: [C].
        bias: [C].
        branch_scale: [B]; T/B rows share one.
        unit: a factor of dy that it does not contain yet.
        of_parameters: whether the sums are wanted ([0] if not).

    Returns:
        The gradient of x, and for `added` partial sums [3, programs, C]: gradients of weight and
        bias, and the column sums of branch_scale · grad_out.
    """
    T, C = x.shape
    dx = torch.empty_like(x)
    R, K, num_warps = whole_rows(C, 8)
    per_program = rows_per_program(T, 1)
    programs = cdiv(T, per_program)
    partial = x.new_empty((3, programs, C) if of_parameters else 0, dtype=torch.float32)
    if T:
        _layer_norm_backward[(programs,)](
            grad_out,
            dy,
            x,
            mean,
            rstd,
            weight,
            bias,
            weight if branch_scale is None else branch_scale,
            weight if unit is None else unit,
            dx,
            partial,
            T,
            per_program,
            1 if branch_scale is None else T // branch_scale.numel(),
            C,
            HAS_BRANCH_SCALE=branch_scale is not None,
            HAS_UNIT=unit is not None,
            OF_PARAMETERS=of_parameters,
            R=R,
            K=K,
            num_warps=num_warps,
        )
    return dx, partial


def add_normalised(
    branch: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch_scale · norm(branch + bias), all [T, C], and the norm's mean and rstd [T]."""
    T, C = x.shape
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
    if T:
        R, K, num_warps = whole_rows(C, 16)
        _add_normalised[(cdiv(T, R),)](
            branch,
            x,
            bias,
            weight,
            norm_bias,
            bias if branch_scale is None else branch_scale,
            out,
            mean,
            rstd,
            T,
            1 if branch_scale is None else T // branch_scale.numel(),
            C,
            eps,
            HAS_BRANCH_SCALE=branch_scale is not None,
            R=R,
            K=K,
            num_warps=num_warps,
        )
    return out, mean, rstd


def add_normalised_backward(
    grad_out: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor,
    weight: Tensor,
    branch_scale: Tensor | None,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the branch [T, C], and partial sums [3, programs, C] for `added`.

    They are the gradients of its bias and of the norm's weight and bias; [0] if not wanted.
    """
    T, C = branch.shape
    grad = torch.empty_like(branch)
    R, K, num_warps = whole_rows(C, 8)
    per_program = rows_per_program(T, 1)
    programs = cdiv(T, per_program)
    partial = branch.new_empty((3, programs, C) if of_parameters else 0, dtype=torch.float32)
    if T:
        _add_normalised_backward[(programs,)](
            grad_out,
            branch,
            mean,
            rstd,
            bias,
            weight,
            bias if branch_scale is None else branch_scale,
            grad,
            partial,
            T,
            per_program,
            1 if branch_scale is None else T // branch_scale.numel(),
            C,
            HAS_BRANCH_SCALE=branch_scale is not None,
            OF_PARAMETERS=of_parameters,
            R=R,
            K=K,
            num_warps=num_warps,
        )
    return grad, partial
