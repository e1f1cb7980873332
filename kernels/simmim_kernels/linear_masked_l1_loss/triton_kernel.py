"""Linear head and masked L1 loss in Triton: predictions live in registers only.

Three matrix products, each over the hidden cells alone: forward (its epilogue takes the loss and
writes sign words), and backward for features and weight with the sign matrix as a factor. Cells are
taken in an order that puts the hidden ones first; how many there are stays on the device.

D width of the features, S side of a cell; an output column is a pixel of a cell, rows of pixels
padded to whole groups of 16 (one sign word). M cells, N columns, K of the summed dimension a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.linear_masked_l1_loss.reference import hidden_cells
from simmim_kernels.masked_l1_loss.arguments import Loss, Target, signs_shape
from simmim_kernels.masked_l1_loss.triton_kernel import finish, plain_target, sign_words, signs_of
from simmim_kernels.triton_backend import product_precision
from simmim_kernels.triton_launch import cdiv, kernel


@kernel
@triton.jit
def _linear_masked_l1(
    p_features,
    p_weight,
    p_bias,
    p_image,
    p_mask,
    p_mean,
    p_std,
    p_order,
    p_count,
    p_signs,
    p_partial,
    image_b,
    image_c,
    image_y,
    image_x,
    D,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BYTES: tl.constexpr,
    KEEP_SIGNS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    COLUMNS: tl.constexpr = C * S * PADDED
    o_partial = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    count = tl.load(p_count)
    if tl.program_id(0) * M >= count:
        tl.store(p_partial + o_partial, 0.0)
        return
    o_row = tl.program_id(0) * M + tl.arange(0, M)
    m_row = o_row < count
    cell = tl.load(p_order + o_row, mask=m_row, other=0)

    column = tl.program_id(1) * N + tl.arange(0, N)
    run, within = column // PADDED, column % PADDED
    m_column = (column < COLUMNS) & (within < S)
    o_output = run * S + within

    o_k = tl.arange(0, K)
    accumulator = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, D, K):
        m_k = start + o_k < D
        features = tl.load(
            p_features + cell[:, None] * D + (start + o_k)[None, :],
            mask=m_row[:, None] & m_k[None, :],
            other=0.0,
        )
        weight = tl.load(
            p_weight + o_output[None, :] * D + (start + o_k)[:, None],
            mask=m_column[None, :] & m_k[:, None],
            other=0.0,
        )
        accumulator = tl.dot(features, weight, accumulator, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(p_bias + o_output, mask=m_column, other=0.0).to(tl.float32)
        accumulator += bias[None, :]

    c, i = run // S, run % S
    b = cell // ((H // S) * (W // S))
    y = (cell // (W // S) % (H // S) * S)[:, None] + i[None, :]
    x = (cell % (W // S) * S)[:, None] + within[None, :]
    m_tile = m_row[:, None] & m_column[None, :]
    if CELL_H % S != 0 or CELL_W % S != 0:  # a projected cell may have visible pixels
        o_mask = (b[:, None] * (H // CELL_H) + y // CELL_H) * (W // CELL_W) + x // CELL_W
        m_tile = m_tile & (tl.load(p_mask + o_mask, mask=m_tile, other=0) != 0)
    o_image = b[:, None] * image_b + c[None, :] * image_c + y * image_y + x * image_x
    target = tl.load(p_image + o_image, mask=m_tile, other=0).to(tl.float32)
    if BYTES:
        mean = tl.load(p_mean + c, mask=m_column, other=0.0)
        std = tl.load(p_std + c, mask=m_column, other=1.0)
        target = target * (1.0 / (255.0 * std))[None, :] - (mean / std)[None, :]
    error = tl.where(m_tile, accumulator - target, 0.0)
    if KEEP_SIGNS:
        words = sign_words(tl.reshape(error, (M, N // 16, 16)), tl.arange(0, 16)[None, None, :], 2)
        o_word = tl.program_id(1) * (N // 16) + tl.arange(0, N // 16)
        m_word = m_row[:, None] & (o_word < COLUMNS // 16)[None, :]
        tl.store(p_signs + cell[:, None] * (COLUMNS // 16) + o_word[None, :], words, mask=m_word)
    tl.store(p_partial + o_partial, tl.sum(tl.sum(tl.abs(error), axis=1), axis=0))


@triton.jit
def _sign_tile(
    p_signs, cell, m_row, i_columns, WORDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The signs [M, N] of a tile of cells and columns, in float32."""
    o_word = i_columns * (N // 16) + tl.arange(0, N // 16)
    words = tl.load(
        p_signs + cell[:, None] * WORDS + o_word[None, :],
        mask=m_row[:, None] & (o_word < WORDS)[None, :],
        other=0,
    )
    return tl.reshape(signs_of(words[:, :, None], tl.arange(0, 16)[None, None, :]), (M, N))


@kernel
@triton.jit
def _grad_features(
    p_step,
    p_signs,
    p_weight,
    p_order,
    p_count,
    p_grad,
    D,
    C: tl.constexpr,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    COLUMNS: tl.constexpr = C * S * PADDED
    count = tl.load(p_count)
    if tl.program_id(0) * M >= count:
        return
    o_row = tl.program_id(0) * M + tl.arange(0, M)
    m_row = o_row < count
    cell = tl.load(p_order + o_row, mask=m_row, other=0)
    o_feature = tl.program_id(1) * N + tl.arange(0, N)
    m_feature = o_feature < D
    accumulator = tl.zeros((M, N), dtype=tl.float32)
    for i_columns in range(0, (COLUMNS + K - 1) // K):
        column = i_columns * K + tl.arange(0, K)
        within = column % PADDED
        m_column = (column < COLUMNS) & (within < S)
        weight = tl.load(
            p_weight + (column // PADDED * S + within)[:, None] * D + o_feature[None, :],
            mask=m_column[:, None] & m_feature[None, :],
            other=0.0,
        )
        signs = _sign_tile(p_signs, cell, m_row, i_columns, COLUMNS // 16, M, K)
        accumulator = tl.dot(signs.to(weight.dtype), weight, accumulator, input_precision=PRECISION)
    b_grad = (accumulator * tl.load(p_step)).to(p_grad.dtype.element_ty)
    o_grad = cell[:, None] * D + o_feature[None, :]
    tl.store(p_grad + o_grad, b_grad, mask=m_row[:, None] & m_feature[None, :])


@kernel
@triton.jit
def _grad_weight(
    p_step,
    p_signs,
    p_features,
    p_order,
    p_count,
    p_grad_weight,
    p_grad_bias,
    D,
    C: tl.constexpr,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    COLUMNS: tl.constexpr = C * S * PADDED
    count = tl.load(p_count)
    column = tl.program_id(0) * M + tl.arange(0, M)
    within = column % PADDED
    m_column = (column < COLUMNS) & (within < S)
    o_output = column // PADDED * S + within
    o_feature = tl.program_id(1) * N + tl.arange(0, N)
    m_feature = o_feature < D
    accumulator = tl.zeros((M, N), dtype=tl.float32)
    b_bias = tl.zeros((M,), dtype=tl.float32)
    for start in range(0, count, K):
        o_row = start + tl.arange(0, K)
        m_row = o_row < count
        cell = tl.load(p_order + o_row, mask=m_row, other=0)
        signs = _sign_tile(p_signs, cell, m_row, tl.program_id(0), COLUMNS // 16, K, M)
        features = tl.load(
            p_features + cell[:, None] * D + o_feature[None, :],
            mask=m_row[:, None] & m_feature[None, :],
            other=0.0,
        )
        b_bias += tl.sum(signs, axis=0)
        accumulator = tl.dot(
            tl.trans(signs).to(features.dtype), features, accumulator, input_precision=PRECISION
        )
    step = tl.load(p_step)
    tl.store(
        p_grad_weight + o_output[:, None].to(tl.int64) * D + o_feature[None, :],
        (accumulator * step).to(p_grad_weight.dtype.element_ty),
        mask=m_column[:, None] & m_feature[None, :],
    )
    b_bias *= step
    m_bias = m_column & (tl.program_id(1) == 0)  # one program of those that have the same sum
    tl.store(p_grad_bias + o_output, b_bias.to(p_grad_bias.dtype.element_ty), mask=m_bias)


def _order(mask: Tensor, grid: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """All cells, those to be projected first, and how many those are; int64 on the device."""
    cells = hidden_cells(mask, grid, stride).flatten()
    return torch.argsort(cells.logical_not(), stable=True), cells.sum()


def forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Target, keep_signs: bool
) -> Loss:
    """The loss and what its gradient needs."""
    B, h, w, D = features.shape
    image, is_bytes = plain_target(target)
    _, mask, mean, std, stride, _ = target
    C, H, W = image.shape[1:]
    order, count = _order(mask, (h, w), stride)
    shape = signs_shape(features.shape, target, keep_signs)
    signs = torch.zeros(shape, dtype=torch.int32, device=features.device)
    M, N, K = 64, 128, 64 if features.dtype != torch.float32 else 32
    columns = C * stride * (-(-stride // 16) * 16)
    grid = (cdiv(B * h * w, M), cdiv(columns, N))
    partial = features.new_empty(grid[0] * grid[1], dtype=torch.float32)
    if partial.numel():
        _linear_masked_l1[grid](
            features,
            weight,
            weight if bias is None else bias,
            image,
            mask.view(torch.int8),
            partial if mean is None else mean,
            partial if std is None else std,
            order,
            count,
            signs,
            partial,
            *image.stride(),
            D,
            C=C,
            H=H,
            W=W,
            S=stride,
            CELL_H=H // mask.shape[1],
            CELL_W=W // mask.shape[2],
            HAS_BIAS=bias is not None,
            BYTES=is_bytes,
            KEEP_SIGNS=keep_signs,
            PRECISION=product_precision(features.dtype),
            M=M,
            N=N,
            K=K,
            num_warps=8,
            num_stages=3,
        )
    return Loss(*finish(partial, image, mask), signs)


def backward(
    grad_out: Tensor,
    per_pixel: Tensor,
    signs: Tensor,
    features: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: int,
    of_features: bool,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias; [0] where it is not wanted."""
    step = grad_out * per_pixel
    B, h, w, D = features.shape
    channels = weight.shape[0] // stride**2
    columns = channels * stride * (-(-stride // 16) * 16)
    order, count = _order(mask, (h, w), stride)
    precision = product_precision(features.dtype)
    M, N, K = 64, 128, 64 if features.dtype != torch.float32 else 32
    grad_features = torch.zeros_like(features) if of_features else features.new_empty(0)
    if of_features and features.numel():
        _grad_features[(cdiv(B * h * w, M), cdiv(D, N))](
            step,
            signs,
            weight,
            order,
            count,
            grad_features,
            D,
            C=channels,
            S=stride,
            PRECISION=precision,
            M=M,
            N=N,
            K=K,
            num_warps=8,
            num_stages=3,
        )
    grad_weight = weight.new_empty(weight.shape if of_parameters else (0,))
    grad_bias = weight.new_empty(weight.shape[:1] if of_parameters else (0,))
    if of_parameters:
        _grad_weight[(cdiv(columns, M), cdiv(D, N))](
            step,
            signs,
            features,
            order,
            count,
            grad_weight,
            grad_bias,
            D,
            C=channels,
            S=stride,
            PRECISION=precision,
            M=M,
            N=N,
            K=K,
            num_warps=8,
            num_stages=3,
        )
    return grad_features, grad_weight, grad_bias
