"""Mask-token substitution in Triton: one pass forward, one backward, and a small sum.

B batch, L tokens of an image, D width; a row is one token of one image; R rows and K columns of a
tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.triton_launch import cdiv, kernel, next_power_of_2

# Elements of a tile; 16-byte accesses for each of 128 threads in every dtype.
_TILE = 2048
# Rows that one program of the backward sums before it writes a partial sum of the mask token: its
# bytes are then 1/64 of those read, and ViT-B at batch 64 still has 588 programs.
ROWS_PER_PROGRAM = 64


@kernel
@triton.jit
def _substitute(
    p_tokens,
    p_mask,
    p_mask_token,
    p_position,
    p_out,
    rows,
    tokens_per_image,
    D,
    HAS_POSITION: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_row, m_column = o_row < rows, o_column < D
    m_tile = m_row[:, None] & m_column[None, :]
    o_tile = o_row[:, None].to(tl.int64) * D + o_column[None, :]
    hidden = tl.load(p_mask + o_row, mask=m_row, other=1) != 0
    # hidden rows are not even read: what they hold must not matter
    visible = tl.load(p_tokens + o_tile, mask=m_tile & ~hidden[:, None], other=0.0).to(tl.float32)
    token = tl.load(p_mask_token + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_out = tl.where(hidden[:, None], token[None, :], visible)
    if HAS_POSITION:
        o_position = (o_row % tokens_per_image)[:, None] * D + o_column[None, :]
        b_out += tl.load(p_position + o_position, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)


@kernel
@triton.jit
def _substitute_backward(
    p_grad_out,
    p_mask,
    p_grad_tokens,
    p_partial,
    rows,
    D,
    ROWS_PER_PROGRAM: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    i_rows = tl.program_id(0)
    o_column = tl.program_id(1) * K + tl.arange(0, K)
    m_column = o_column < D
    b_sum = tl.zeros((K,), dtype=tl.float32)
    for start in range(0, ROWS_PER_PROGRAM, R):
        o_row = i_rows * ROWS_PER_PROGRAM + start + tl.arange(0, R)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_tile = o_row[:, None].to(tl.int64) * D + o_column[None, :]
        hidden = tl.load(p_mask + o_row, mask=m_row, other=0) != 0
        b_grad = tl.load(p_grad_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_sum += tl.sum(tl.where(hidden[:, None], b_grad, 0.0), axis=0)
        b_tokens = tl.where(hidden[:, None], 0.0, b_grad)
        tl.store(p_grad_tokens + o_tile, b_tokens.to(p_grad_tokens.dtype.element_ty), mask=m_tile)
    tl.store(p_partial + i_rows.to(tl.int64) * D + o_column, b_sum, mask=m_column)


@kernel
@triton.jit
def _sum_rows(p_partial, p_out, rows, D, R: tl.constexpr, K: tl.constexpr):
    o_column = tl.program_id(0) * K + tl.arange(0, K)
    m_column = o_column < D
    b_sum = tl.zeros((R, K), dtype=tl.float32)
    for start in range(0, rows, R):
        o_row = start + tl.arange(0, R)
        m_tile = (o_row < rows)[:, None] & m_column[None, :]
        b_sum += tl.load(p_partial + o_row[:, None] * D + o_column[None, :], mask=m_tile, other=0.0)
    b_total = tl.sum(b_sum, axis=0)
    tl.store(p_out + o_column, b_total.to(p_out.dtype.element_ty), mask=m_column)


def _tile(D: int) -> tuple[int, int]:
    """Rows and columns of a tile: columns that divide the width where a power of two does."""
    columns = next_power_of_2(D)
    while columns > 512 or (columns > 64 and D % columns):
        columns //= 2
    columns = max(columns, 16)
    return min(_TILE // columns, ROWS_PER_PROGRAM), columns


def forward(tokens: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
    """[B, L, D]; all inputs contiguous and of one dtype."""
    B, L, D = tokens.shape
    out = torch.empty_like(tokens)
    if out.numel() == 0:
        return out
    R, K = _tile(D)
    _substitute[(cdiv(B * L, R), cdiv(D, K))](
        tokens,
        mask.view(torch.int8),
        mask_token,
        mask_token if pos_embed is None else pos_embed,
        out,
        B * L,
        L,
        D,
        HAS_POSITION=pos_embed is not None,
        R=R,
        K=K,
        num_warps=4,
    )
    return out


def backward(grad_out: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens [B, L, D] and of the mask token [D]."""
    B, L, D = grad_out.shape
    grad_tokens = torch.empty_like(grad_out)
    grad_mask_token = torch.empty(D, dtype=grad_out.dtype, device=grad_out.device)
    if grad_out.numel() == 0:
        return grad_tokens, grad_mask_token.zero_()
    R, K = _tile(D)
    programs = cdiv(B * L, ROWS_PER_PROGRAM)
    partial = torch.empty(programs, D, dtype=torch.float32, device=grad_out.device)
    _substitute_backward[(programs, cdiv(D, K))](
        grad_out,
        mask.view(torch.int8),
        grad_tokens,
        partial,
        B * L,
        D,
        ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
        R=R,
        K=K,
        num_warps=4,
    )
    _sum_rows[(cdiv(D, 64),)](partial, grad_mask_token, programs, D, R=32, K=64, num_warps=4)
    return grad_tokens, grad_mask_token
