"""What a transformer block does between products and norms, in Triton: one pass over memory each.

T tokens, C width, M hidden width of the MLP; R rows and K columns of a tile. Arithmetic is float32
in registers. Sums over tokens take two steps, a partial sum of some rows per program and a kernel
that adds these, in an order that depends on the shape only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.triton_launch import cdiv, kernel, next_power_of_2
from simmim_kernels.weight_copies import in_dtype

# Elements of a tile; 16-byte accesses for each of 128 threads in every dtype.
_TILE = 2048
# Rows of a tile at most, and rows that a program sums at least: partial sums are then a small part
# of the bytes that it moves.
_ROWS = 32


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """The normal distribution: what is below x, and exp(-x²/2).

    `EXACT` is for float32. For 16-bit results the tail is 5 terms times the exponential that the
    backward needs anyway (Abramowitz & Stegun 7.1.26, off by 1e-7 at most): with erf the pass would
    have too many instructions per byte to run at the speed of an A100's memory.
    """
    b_exp = tl.exp2(x * x * -0.7213475204444817)
    if EXACT:
        b_below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        t = 1.0 / (1.0 + 0.2316418883 * tl.abs(x))
        b_tail = t * (-0.7265760135 + t * 0.5307027145) + 0.7107068705
        b_tail = (t * (t * (t * b_tail - 0.142248368) + 0.127414796)) * b_exp
        b_below = tl.where(x < 0, b_tail, 1.0 - b_tail)
    return b_below, b_exp


@kernel
@triton.jit
def _gelu(p_hidden, p_bias, p_out, rows, M, R: tl.constexpr, K: tl.constexpr):
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_column = o_column < M
    m_tile = (o_row < rows)[:, None] & m_column[None, :]
    o_tile = o_row[:, None].to(tl.int64) * M + o_column[None, :]
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    b_x = tl.load(p_hidden + o_tile, mask=m_tile, other=0.0).to(tl.float32) + bias[None, :]
    b_below, _ = _normal(b_x, p_out.dtype.element_ty == tl.float32)
    b_out = b_x * b_below
    tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)


@kernel
@triton.jit
def _gelu_backward(
    p_grad,
    p_hidden,
    p_bias,
    p_branch_scale,
    p_out,
    p_partial,
    rows,
    rows_per_program,
    tokens_per_image,
    M,
    HAS_BRANCH_SCALE: tl.constexpr,
    OF_PARAMETERS: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_column = o_column < M
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    b_sum = tl.zeros((R, K), dtype=tl.float32)
    for start in range(0, rows_per_program, R):
        o_row = tl.program_id(0) * rows_per_program + start + tl.arange(0, R)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_tile = o_row[:, None].to(tl.int64) * M + o_column[None, :]
        b_x = tl.load(p_hidden + o_tile, mask=m_tile, other=0.0).to(tl.float32) + bias[None, :]
        b_grad = tl.load(p_grad + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_below, b_exp = _normal(b_x, p_grad.dtype.element_ty == tl.float32)
        b_out = b_x * b_below
        b_slope = b_below + b_x * 0.3989422804014327 * b_exp
        if HAS_BRANCH_SCALE:
            o_image = o_row // tokens_per_image
            branch_scale = tl.load(p_branch_scale + o_image, mask=m_row, other=0.0)
            b_out *= branch_scale[:, None]
            b_grad *= branch_scale[:, None]
        b_grad *= b_slope
        tl.store(p_grad + o_tile, b_grad.to(p_grad.dtype.element_ty), mask=m_tile)
        if OF_PARAMETERS:
            tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)
            b_sum += b_grad
    if OF_PARAMETERS:
        o_partial = tl.program_id(0).to(tl.int64) * M + o_column
        tl.store(p_partial + o_partial, tl.sum(b_sum, axis=0), mask=m_column)


@kernel
@triton.jit
def _add_branch(
    p_branch,
    p_x,
    p_bias,
    p_gamma,
    p_branch_scale,
    rows,
    tokens_per_image,
    C,
    HAS_GAMMA: tl.constexpr,
    HAS_BRANCH_SCALE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_row, m_column = o_row < rows, o_column < C
    m_tile = m_row[:, None] & m_column[None, :]
    o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
    b_branch = tl.load(p_branch + o_tile, mask=m_tile, other=0.0).to(tl.float32) + bias[None, :]
    if HAS_GAMMA:
        b_branch *= tl.load(p_gamma + o_column, mask=m_column, other=0.0)[None, :]
    if HAS_BRANCH_SCALE:
        o_image = o_row // tokens_per_image
        b_branch *= tl.load(p_branch_scale + o_image, mask=m_row, other=0.0)[:, None]
    tl.store(p_branch + o_tile, (b_x + b_branch).to(p_branch.dtype.element_ty), mask=m_tile)


@kernel
@triton.jit
def _scale_images(
    p_x, p_branch_scale, p_out, rows, tokens_per_image, C, R: tl.constexpr, K: tl.constexpr
):
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_column < C)[None, :]
    o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
    branch_scale = tl.load(p_branch_scale + o_row // tokens_per_image, mask=m_row, other=0.0)
    b_out = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32) * branch_scale[:, None]
    tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)


@kernel
@triton.jit
def _column_sum(p_x, p_partial, rows, rows_per_program, C, R: tl.constexpr, K: tl.constexpr):
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_column = o_column < C
    b_sum = tl.zeros((R, K), dtype=tl.float32)
    for start in range(0, rows_per_program, R):
        o_row = tl.program_id(0) * rows_per_program + start + tl.arange(0, R)
        m_tile = (o_row < rows)[:, None] & m_column[None, :]
        o_tile = o_row[:, None].to(tl.int64) * C + o_column[None, :]
        b_sum += tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    o_partial = tl.program_id(0).to(tl.int64) * C + o_column
    tl.store(p_partial + o_partial, tl.sum(b_sum, axis=0), mask=m_column)


@kernel
@triton.jit
def _add_partials(
    p_first,
    p_second,
    p_out,
    first_blocks,
    first_sums,
    first_rows,
    first_C,
    second_rows,
    second_C,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Adds [sums, rows, C] over the rows, of two tensors; a program adds K columns of one sum."""
    in_first = tl.program_id(0) < first_blocks
    block = tl.program_id(0) - tl.where(in_first, 0, first_blocks)
    rows, C = tl.where(in_first, first_rows, second_rows), tl.where(in_first, first_C, second_C)
    p_out += tl.where(in_first, 0, first_sums * first_C)
    across = tl.cdiv(C, K)
    i_sum = block // across
    o_column = block % across * K + tl.arange(0, K)
    m_column = o_column < C
    o_sum = i_sum.to(tl.int64) * rows * C
    b_sum = tl.zeros((R, K), dtype=tl.float32)
    for start in range(0, rows, R):
        o_row = start + tl.arange(0, R)
        m_tile = (o_row < rows)[:, None] & m_column[None, :]
        o_tile = o_sum + o_row[:, None].to(tl.int64) * C + o_column[None, :]
        b_sum += tl.load(p_first + o_tile, mask=m_tile & in_first, other=0.0)
        b_sum += tl.load(p_second + o_tile, mask=m_tile & (in_first == 0), other=0.0)
    tl.store(p_out + i_sum * C + o_column, tl.sum(b_sum, axis=0), mask=m_column)


def gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """GELU of hidden + bias, [T, M]."""
    T, M = hidden.shape
    out = torch.empty_like(hidden)
    if T:
        R, K = tile(M)
        grid = (cdiv(T, R), cdiv(M, K))
        _gelu[grid](hidden, bias, out, T, M, R=R, K=K, num_warps=4)
    return out


def gelu_backward(
    grad: Tensor,
    hidden: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """Turns the gradient of `gelu`'s output, [T, M], into branch_scale · that of its input.

    Returns:
        branch_scale · the output, computed again, and partial sums of the gradient of the bias,
        [1, programs, M], for `added`; [0] each unless `of_parameters`.
    """
    T, M = hidden.shape
    R, K = tile(M)
    per_program = rows_per_program(T, cdiv(M, K))
    programs = cdiv(T, per_program)
    out = hidden.new_empty(hidden.shape if of_parameters else 0)
    partial = hidden.new_empty((1, programs, M) if of_parameters else 0, dtype=torch.float32)
    if T:
        _gelu_backward[(programs, cdiv(M, K))](
            grad,
            hidden,
            bias,
            bias if branch_scale is None else branch_scale,
            out,
            partial,
            T,
            per_program,
            1 if branch_scale is None else T // branch_scale.numel(),
            M,
            HAS_BRANCH_SCALE=branch_scale is not None,
            OF_PARAMETERS=of_parameters,
            R=R,
            K=K,
            num_warps=4,
        )
    return out, partial


def add_branch(
    branch: Tensor, x: Tensor, bias: Tensor, gamma: Tensor | None, branch_scale: Tensor | None
) -> None:
    """branch becomes x + branch_scale · gamma · (branch + bias); both [T, C]."""
    T, C = x.shape
    if T:
        R, K = tile(C)
        _add_branch[(cdiv(T, R), cdiv(C, K))](
            branch,
            x,
            bias,
            bias if gamma is None else gamma,
            bias if branch_scale is None else branch_scale,
            T,
            1 if branch_scale is None else T // branch_scale.numel(),
            C,
            HAS_GAMMA=gamma is not None,
            HAS_BRANCH_SCALE=branch_scale is not None,
            R=R,
            K=K,
            num_warps=4,
        )


def scale_images(x: Tensor, branch_scale: Tensor) -> Tensor:
    """branch_scale [B] · x [T, C]; T/B rows share one."""
    T, C = x.shape
    out = torch.empty_like(x)
    if T:
        R, K = tile(C)
        grid = (cdiv(T, R), cdiv(C, K))
        per_image = T // branch_scale.numel()
        _scale_images[grid](x, branch_scale, out, T, per_image, C, R=R, K=K, num_warps=4)
    return out


def column_partial(x: Tensor) -> Tensor:
    """Partial sums over the rows of x [T, C], float32 [1, programs, C], for `added`."""
    T, C = x.shape
    R, K = tile(C)
    across = cdiv(C, K)
    per_program = rows_per_program(T, across)
    programs = cdiv(T, per_program)
    partial = x.new_empty((1, programs, C), dtype=torch.float32)
    if T:
        _column_sum[(programs, across)](x, partial, T, per_program, C, R=R, K=K, num_warps=4)
    return partial


def added(first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
    """All sums over the rows of one or two tensors of partial sums, [sums, rows, C], one by one."""
    sums, rows, C = first.shape
    blocks = sums * cdiv(C, 16)
    more, more_rows, more_C = (0, rows, C) if second is None else second.shape
    out = first.new_empty(sums * C + more * more_C)
    _add_partials[(blocks + more * cdiv(more_C, 16),)](
        first,
        first if second is None else second,
        out,
        blocks,
        sums,
        rows,
        C,
        more_rows,
        more_C,
        R=128,
        K=16,
        num_warps=4,
    )
    return out.split_with_sizes([C] * sums + [more_C] * more)


def rows_per_program(rows: int, across: int) -> int:
    """Rows that one of `across` programs side by side sums.

    Many, but not so many that fewer than 400 programs are left: three per multiprocessor of an
    H100.
    """
    per_program = 256
    while per_program > _ROWS and cdiv(rows, per_program) * across < 400:
        per_program //= 2
    return per_program


def whole_rows(C: int, per_thread: int) -> tuple[int, int, int]:
    """Rows and columns of a tile as wide as a row, and warps that hold `per_thread` elements."""
    columns = max(next_power_of_2(C), 16)
    rows = max(min(128 * per_thread // columns, _ROWS), 1)
    return rows, columns, min(max(columns // (32 * per_thread), 4), 32)


def tile(C: int) -> tuple[int, int]:
    """Rows and columns of a tile: columns that divide the width where a power of two does."""
    columns = next_power_of_2(C)
    while columns > 512 or (columns > 64 and C % columns):
        columns //= 2
    columns = max(columns, 16)
    return min(_TILE // columns, _ROWS), columns


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a · b, in their dtype; autocast is out of the way in an op's launcher."""
    return torch.mm(a, b) if bias is None else torch.addmm(in_dtype(bias, a.dtype), a, b)


def forward_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias in the dtype of x; weight [M, C] as the op got it."""
    return product(x, in_dtype(weight, x.dtype).t(), bias)


def backward_product(grad: Tensor, weight: Tensor) -> Tensor:
    """grad · weight in the dtype of grad; weight [M, C] as the op got it."""
    return torch.mm(grad, in_dtype(weight, grad.dtype))


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """gradᵀ · x in the dtype of `weight`: of float32 weights it is not rounded on the way."""
    if weight.dtype == grad.dtype:
        return torch.mm(grad.t(), x)
    if grad.is_cuda and torch.version.hip is None:
        return torch.mm(grad.t(), x, out_dtype=weight.dtype)
    return torch.mm(grad.t().to(weight.dtype), x.to(weight.dtype))
