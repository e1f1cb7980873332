"""Window attention in Triton: q, k and v are read from the feature map where they lie.

Up to 64 tokens (32 in float32), a window is one tile of scores: its program needs no statistics of
others, and in the backward neither the forward's output. A backward program takes several windows
of one head and keeps the gradient of their bias in registers. A larger window is cut in tiles:
- forward: a program attends one tile of queries to all keys, with running statistics;
- backward: a program takes one tile, first as keys against all queries, then as queries against
  all keys; the scores are computed twice, so that no two programs add to one number;
- gradient of the bias: a program sums one tile of it over several windows.
Partial sums of the bias's gradient are added by a small kernel, in a fixed order.

Cosines are products of q and k as they are, times one number per query and one per key: nothing is
rounded before it is an exponent. Their gradients are those of the products, less the part along q
and k; what every query has along it also is, summed, the gradient of the head's factor.

H W rows and columns of the map in tokens, h w of a window, S = h·w, N heads, D head width; M rows
and T columns of a tile of scores, K a head width padded to a power of two. A position is the index
of a token in its window.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.substitute_mask_tokens.triton_kernel import _sum_rows
from simmim_kernels.triton_backend import product_precision
from simmim_kernels.triton_launch import cdiv, kernel, next_power_of_2
from simmim_kernels.window_attention.arguments import Windows

# Programs that share the windows of a launch where the gradient of the bias is summed: enough to
# fill a GPU, and few, since each writes a partial sum. A constant keeps sums alike on every GPU.
PROGRAMS = 432

_LOG2E = tl.constexpr(1.4426950408889634)  # exp2 and log2 are instructions, exp and log are not
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tokens(
    i_window,
    o_position,
    H,
    W,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
):
    """Positions of a window as indices of tokens in the map."""
    across = W // w
    in_image = H // h * across
    row = i_window % in_image // across * h + SHIFT_ROWS + o_position // w
    column = i_window % across * w + SHIFT_COLUMNS + o_position % w
    if SHIFT_ROWS > 0:
        row = tl.where(row >= H, row - H, row)
    if SHIFT_COLUMNS > 0:
        column = tl.where(column >= W, column - W, column)
    return (i_window // in_image * H + row).to(tl.int64) * W + column


@triton.jit
def _sides(
    o_position,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
):
    """Bits of a position: beyond the seam in a window where the shift joins the first and last
    columns of the map (1), and where it joins rows (2).
    """
    below = o_position >= (h - SHIFT_ROWS) * w
    right = o_position % w >= w - SHIFT_COLUMNS
    return below.to(tl.int32) * 2 + right.to(tl.int32)


@triton.jit
def _seams(i_window, H, W, h: tl.constexpr, w: tl.constexpr):
    """The seams that run through a window, as bits of _sides."""
    across = W // w
    last_row = i_window // across % (H // h) == H // h - 1
    last_column = i_window % across == across - 1
    return last_row.to(tl.int32) * 2 + last_column.to(tl.int32)


@triton.jit
def _tile(p_map, token, width, i_head, D: tl.constexpr, K: tl.constexpr):
    """Pointers [rows, K] to one head of tokens in a map `width` wide."""
    return p_map + (token * width + i_head * D)[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def _within(o_position, S: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    return (o_position < S)[:, None] & (tl.arange(0, K) < D)[None, :]


@triton.jit
def _inverse_lengths(x):
    """1 / length of rows; 1e-12 is the least length, as that of torch's normalize."""
    wide = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), 1e-12)


@triton.jit
def _shares(x):
    """What 1 / length of rows brings into a product of the other side's gradient."""
    inverse = _inverse_lengths(x)
    if x.dtype == tl.float16:  # where 1e12 is infinite; the row is 0 then
        inverse = tl.where(inverse < 1e12, inverse, 0.0)
    return inverse


@triton.jit
def _products(q, k, scale, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """scale times q·k of a tile [queries, keys], or times their cosine."""
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if COSINE:
        product = product * (_inverse_lengths(q) * scale)[:, None] * _inverse_lengths(k)[None, :]
    else:
        product = product * scale
    return product


@triton.jit
def _along(grad, x, scale):
    """What a gradient has in the direction of rows."""
    return tl.sum(grad * x.to(tl.float32), axis=1) * _inverse_lengths(x) * scale


@triton.jit
def _through_length(grad, x, along, scale):
    """Gradient of rows from that of them divided by their length; `along` is what they have of it
    in their own direction, times scale.
    """
    inverse = _inverse_lengths(x)
    away = tl.where(inverse < 1e12, inverse * inverse * along, 0.0)
    return grad * (inverse * scale)[:, None] - x.to(tl.float32) * away[:, None]


@triton.jit
def _scores(
    score,
    p_bias,
    i_head,
    o_query,
    o_key,
    seams,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
):
    """Scores of products [queries, keys] of a tile: with bias, -100 for pairs that a seam divides
    (as published), and -inf for keys beyond the window.
    """
    S: tl.constexpr = h * w
    if ROW > 0:
        o_bias = (i_head * S + o_query)[:, None] * ROW + o_key[None, :]
        m_bias = (o_query < S)[:, None] & (o_key < ROW)[None, :]  # so masked, loads stay wide
        score += tl.load(p_bias + o_bias, mask=m_bias, other=0.0).to(tl.float32)
    if SHIFT_ROWS + SHIFT_COLUMNS > 0:  # noqa: SIM102 (known when the kernel is compiled)
        if seams != 0:  # most windows have none
            # masked here, as vectors: the tile of their difference, which no window changes, would
            # be computed ahead of the loop and hold 32 registers all the while
            query_side = _sides(o_query, SHIFT_ROWS, SHIFT_COLUMNS, h, w) & seams
            key_side = _sides(o_key, SHIFT_ROWS, SHIFT_COLUMNS, h, w) & seams
            score = tl.where(query_side[:, None] == key_side[None, :], score, score - 100.0)
    return tl.where((o_key < S)[None, :], score, float("-inf"))


@triton.jit
def _weights(score, high, COSINE: tl.constexpr):
    """e^(score - high), one `high` for every row.

    Scores of cosines are as large as 100, and differ exactly; a product with log2(e) does not.
    """
    if COSINE:
        weight = tl.exp2((score - high[:, None]) * _LOG2E)
    else:
        weight = tl.exp2(score * _LOG2E - (high * _LOG2E)[:, None])
    return weight


@kernel
@triton.jit
def _attend_window(
    p_qkv,
    p_bias,
    p_factors,
    p_out,
    p_log_sums,
    H,
    W,
    N,
    scale,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    S: tl.constexpr = h * w
    i_head, i_window = tl.program_id(0) % N, tl.program_id(0) // N
    if COSINE:
        scale = tl.load(p_factors + i_head)
    o = tl.arange(0, T)
    token = _tokens(i_window, o, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
    m_tile = _within(o, S, D, K)
    p_q = _tile(p_qkv, token, 3 * N * D, i_head, D, K)
    q = tl.load(p_q, mask=m_tile, other=0.0)
    k = tl.load(p_q + N * D, mask=m_tile, other=0.0)
    v = tl.load(p_q + 2 * N * D, mask=m_tile, other=0.0)
    product = _products(q, k, scale, COSINE, PRECISION)
    score = _scores(
        product,
        p_bias,
        i_head,
        o,
        o,
        _seams(i_window, H, W, h, w),
        SHIFT_ROWS,
        SHIFT_COLUMNS,
        ROW,
        h,
        w,
    )
    highest = tl.max(score, axis=1)
    weight = _weights(score, highest, COSINE)
    total = tl.sum(weight, axis=1)
    b_out = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
    p_out = _tile(p_out, token, N * D, i_head, D, K)
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_log_sums + token * N + i_head, highest + tl.log2(total) * _LN2, mask=o < S)


@kernel
@triton.jit
def _attend_window_backward(
    p_grad_out,
    p_qkv,
    p_bias,
    p_factors,
    p_log_sums,
    p_grad_qkv,
    p_along,
    p_partial,
    windows,
    programs,
    H,
    W,
    N,
    scale,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    OF_BIAS: tl.constexpr,
    ROW: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    S: tl.constexpr = h * w
    i_head, i_program = tl.program_id(0) % N, tl.program_id(0) // N
    if COSINE:
        scale = tl.load(p_factors + i_head)
    o = tl.arange(0, T)
    m_tile = _within(o, S, D, K)
    grad_bias = tl.zeros((T, T), dtype=tl.float32)
    for i_window in tl.range(i_program, windows, programs, disable_licm=True):
        token = _tokens(i_window, o, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
        p_q = _tile(p_qkv, token, 3 * N * D, i_head, D, K)
        q = tl.load(p_q, mask=m_tile, other=0.0)
        k = tl.load(p_q + N * D, mask=m_tile, other=0.0)
        log_sum = tl.load(p_log_sums + token * N + i_head, mask=o < S, other=0.0)
        p_grad = _tile(p_grad_qkv, token, 3 * N * D, i_head, D, K)

        product = _products(q, k, scale, COSINE, PRECISION)
        score = _scores(
            product,
            p_bias,
            i_head,
            o,
            o,
            _seams(i_window, H, W, h, w),
            SHIFT_ROWS,
            SHIFT_COLUMNS,
            ROW,
            h,
            w,
        )
        weight = _weights(score, log_sum, COSINE)
        if COSINE:  # a rounded log_sum of about 100 is off by 1e-5
            weight = weight / tl.sum(weight, axis=1)[:, None]
        grad = tl.load(_tile(p_grad_out, token, N * D, i_head, D, K), mask=m_tile, other=0.0)
        # loaded where they are needed, stored before the next is computed: registers are short
        grad_v = tl.dot(tl.trans(weight.to(grad.dtype)), grad, input_precision=PRECISION)
        tl.store(p_grad + 2 * N * D, grad_v.to(q.dtype), mask=m_tile)
        v = tl.load(p_q + 2 * N * D, mask=m_tile, other=0.0)
        grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(weight * grad_weight, axis=1)
        grad_score = weight * (grad_weight - delta[:, None])
        if OF_BIAS:
            grad_bias += grad_score
        if COSINE:
            for_q = (grad_score * _shares(k)[None, :]).to(q.dtype)
            grad_q = tl.dot(for_q, k, input_precision=PRECISION)
            along = _along(grad_q, q, scale)
            tl.store(p_along + token * N + i_head, along, mask=o < S)
            tl.store(p_grad, _through_length(grad_q, q, along, scale).to(q.dtype), mask=m_tile)
            for_k = (grad_score * _shares(q)[:, None]).to(q.dtype)
            grad_k = tl.dot(tl.trans(for_k), q, input_precision=PRECISION)
            grad_k = _through_length(grad_k, k, _along(grad_k, k, scale), scale)
        else:
            grad_score = grad_score.to(q.dtype)
            grad_q = tl.dot(grad_score, k, input_precision=PRECISION) * scale
            tl.store(p_grad, grad_q.to(q.dtype), mask=m_tile)
            grad_k = tl.dot(tl.trans(grad_score), q, input_precision=PRECISION) * scale
        tl.store(p_grad + N * D, grad_k.to(k.dtype), mask=m_tile)
    if OF_BIAS:
        o_partial = (tl.program_id(0) * S + o[:, None]) * S + o[None, :]
        tl.store(p_partial + o_partial, grad_bias, mask=(o < S)[:, None] & (o < S)[None, :])


@kernel
@triton.jit
def _attend_tile(
    p_qkv,
    p_bias,
    p_factors,
    p_out,
    p_log_sums,
    H,
    W,
    N,
    scale,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    S: tl.constexpr = h * w
    TILES: tl.constexpr = (S + M - 1) // M
    i_head = tl.program_id(0) // TILES % N
    i_window = tl.program_id(0) // TILES // N
    if COSINE:
        scale = tl.load(p_factors + i_head)
    o_query = tl.program_id(0) % TILES * M + tl.arange(0, M)
    token = _tokens(i_window, o_query, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
    m_query = _within(o_query, S, D, K)
    q = tl.load(_tile(p_qkv, token, 3 * N * D, i_head, D, K), mask=m_query, other=0.0)
    highest = tl.full((M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    b_out = tl.zeros((M, K), dtype=tl.float32)
    for start in range(0, S, T):
        o_key = start + tl.arange(0, T)
        other = _tokens(i_window, o_key, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
        p_k = _tile(p_qkv, other, 3 * N * D, i_head, D, K) + N * D
        m_key = _within(o_key, S, D, K)
        k = tl.load(p_k, mask=m_key, other=0.0)
        v = tl.load(p_k + N * D, mask=m_key, other=0.0)
        product = _products(q, k, scale, COSINE, PRECISION)
        score = _scores(
            product,
            p_bias,
            i_head,
            o_query,
            o_key,
            _seams(i_window, H, W, h, w),
            SHIFT_ROWS,
            SHIFT_COLUMNS,
            ROW,
            h,
            w,
        )
        now_highest = tl.maximum(highest, tl.max(score, axis=1))
        shrunk = tl.exp2((highest - now_highest) * _LOG2E)
        weight = _weights(score, now_highest, COSINE)
        total = total * shrunk + tl.sum(weight, axis=1)
        b_out = b_out * shrunk[:, None]
        b_out = tl.dot(weight.to(v.dtype), v, b_out, input_precision=PRECISION)
        highest = now_highest
    b_out = b_out / total[:, None]
    p_out = _tile(p_out, token, N * D, i_head, D, K)
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_query)
    tl.store(p_log_sums + token * N + i_head, highest + tl.log2(total) * _LN2, mask=o_query < S)


@kernel
@triton.jit
def _attend_tile_backward(
    p_grad_out,
    p_qkv,
    p_bias,
    p_factors,
    p_out,
    p_log_sums,
    p_grad_qkv,
    p_along,
    p_delta,
    positions,
    H,
    W,
    N,
    scale,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    OF_BIAS: tl.constexpr,
    ROW: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    S: tl.constexpr = h * w
    TILES: tl.constexpr = (S + M - 1) // M
    i_head = tl.program_id(0) // TILES % N
    i_window = tl.program_id(0) // TILES // N
    if COSINE:
        scale = tl.load(p_factors + i_head)
    first = tl.program_id(0) % TILES * M

    # The tile as keys, T at a time. Inner loops end at `positions`, which is S, but not known when
    # the kernel is compiled: loops of three rounds are unrolled, and registers are short then.
    for first_key in range(first, tl.minimum(first + M, S), T):
        o_key = first_key + tl.arange(0, T)
        key_token = _tokens(i_window, o_key, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
        m_key = _within(o_key, S, D, K)
        p_k = _tile(p_qkv, key_token, 3 * N * D, i_head, D, K) + N * D
        k = tl.load(p_k, mask=m_key, other=0.0)
        v = tl.load(p_k + N * D, mask=m_key, other=0.0)
        grad_k = tl.zeros((T, K), dtype=tl.float32)
        grad_v = tl.zeros((T, K), dtype=tl.float32)
        along_k = tl.zeros((T,), dtype=tl.float32)
        for first_query in range(0, positions, M):
            o_query = first_query + tl.arange(0, M)
            token = _tokens(i_window, o_query, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
            m_query = _within(o_query, S, D, K)
            p_grad = _tile(p_grad_out, token, N * D, i_head, D, K)
            p_o = _tile(p_out, token, N * D, i_head, D, K)
            q = tl.load(_tile(p_qkv, token, 3 * N * D, i_head, D, K), mask=m_query, other=0.0)
            log_sum = tl.load(p_log_sums + token * N + i_head, mask=o_query < S, other=0.0)
            product = _products(q, k, scale, COSINE, PRECISION)
            score = _scores(
                product,
                p_bias,
                i_head,
                o_query,
                o_key,
                _seams(i_window, H, W, h, w),
                SHIFT_ROWS,
                SHIFT_COLUMNS,
                ROW,
                h,
                w,
            )
            weight = _weights(score, log_sum, COSINE)
            # loaded where they are needed: registers are short here
            grad = tl.load(p_grad, mask=m_query, other=0.0)
            grad_v = tl.dot(
                tl.trans(weight.to(grad.dtype)), grad, grad_v, input_precision=PRECISION
            )
            grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            out = tl.load(p_o, mask=m_query, other=0.0)
            delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
            grad_score = weight * (grad_weight - delta[:, None])
            if COSINE:
                along_k += tl.sum(grad_score * product, axis=0)
                grad_score = grad_score * _shares(q)[:, None]
            grad_score = grad_score.to(q.dtype)
            grad_k = tl.dot(tl.trans(grad_score), q, grad_k, input_precision=PRECISION)
        if COSINE:
            grad_k = _through_length(grad_k, k, along_k, scale)
        else:
            grad_k = grad_k * scale
        p_grad_k = _tile(p_grad_qkv, key_token, 3 * N * D, i_head, D, K) + N * D
        tl.store(p_grad_k, grad_k.to(k.dtype), mask=m_key)
        tl.store(p_grad_k + N * D, grad_v.to(v.dtype), mask=m_key)

    # The tile as queries.
    o_query = first + tl.arange(0, M)
    token = _tokens(i_window, o_query, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
    m_query = _within(o_query, S, D, K)
    p_grad = _tile(p_grad_out, token, N * D, i_head, D, K)
    p_o = _tile(p_out, token, N * D, i_head, D, K)
    q = tl.load(_tile(p_qkv, token, 3 * N * D, i_head, D, K), mask=m_query, other=0.0)
    log_sum = tl.load(p_log_sums + token * N + i_head, mask=o_query < S, other=0.0)
    grad = tl.load(p_grad, mask=m_query, other=0.0)
    out = tl.load(p_o, mask=m_query, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if OF_BIAS:
        tl.store(p_delta + token * N + i_head, delta, mask=o_query < S)
    grad_q = tl.zeros((M, K), dtype=tl.float32)
    along_q = tl.zeros((M,), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    middle = tl.zeros((M,), dtype=tl.float32)
    for first_key in range(0, positions, T):
        o_key = first_key + tl.arange(0, T)
        key_token = _tokens(i_window, o_key, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
        m_key = _within(o_key, S, D, K)
        p_k = _tile(p_qkv, key_token, 3 * N * D, i_head, D, K) + N * D
        k = tl.load(p_k, mask=m_key, other=0.0)
        v = tl.load(p_k + N * D, mask=m_key, other=0.0)
        product = _products(q, k, scale, COSINE, PRECISION)
        score = _scores(
            product,
            p_bias,
            i_head,
            o_query,
            o_key,
            _seams(i_window, H, W, h, w),
            SHIFT_ROWS,
            SHIFT_COLUMNS,
            ROW,
            h,
            w,
        )
        weight = _weights(score, log_sum, COSINE)
        grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_score = weight * (grad_weight - delta[:, None])
        if COSINE:
            along_q += tl.sum(grad_score * product, axis=1)
            total += tl.sum(grad_score, axis=1)
            middle += tl.sum(weight * product, axis=1)
            grad_score = grad_score * _shares(k)[None, :]
        grad_score = grad_score.to(k.dtype)
        grad_q = tl.dot(grad_score, k, grad_q, input_precision=PRECISION)
    if COSINE:
        # the total is 0 but for the rounding of `out`, which must not come times the cosines
        along_q -= total * middle
        tl.store(p_along + token * N + i_head, along_q, mask=o_query < S)
        grad_q = _through_length(grad_q, q, along_q, scale)
    else:
        grad_q = grad_q * scale
    p_grad_q = _tile(p_grad_qkv, token, 3 * N * D, i_head, D, K)
    tl.store(p_grad_q, grad_q.to(q.dtype), mask=m_query)


@kernel
@triton.jit
def _grad_bias_tile(
    p_grad_out,
    p_qkv,
    p_bias,
    p_factors,
    p_log_sums,
    p_delta,
    p_partial,
    windows,
    programs,
    H,
    W,
    N,
    scale,
    SHIFT_ROWS: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    S: tl.constexpr = h * w
    i_head, i_program = tl.program_id(0) % N, tl.program_id(0) // N
    if COSINE:
        scale = tl.load(p_factors + i_head)
    o_query = tl.program_id(1) * M + tl.arange(0, M)
    o_key = tl.program_id(2) * T + tl.arange(0, T)
    m_query, m_key = _within(o_query, S, D, K), _within(o_key, S, D, K)
    grad_bias = tl.zeros((M, T), dtype=tl.float32)
    for i_window in range(i_program, windows, programs):
        token = _tokens(i_window, o_query, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
        other = _tokens(i_window, o_key, H, W, SHIFT_ROWS, SHIFT_COLUMNS, h, w)
        p_k = _tile(p_qkv, other, 3 * N * D, i_head, D, K) + N * D
        q = tl.load(_tile(p_qkv, token, 3 * N * D, i_head, D, K), mask=m_query, other=0.0)
        k = tl.load(p_k, mask=m_key, other=0.0)
        v = tl.load(p_k + N * D, mask=m_key, other=0.0)
        grad = tl.load(_tile(p_grad_out, token, N * D, i_head, D, K), mask=m_query, other=0.0)
        o_row = token * N + i_head
        log_sum = tl.load(p_log_sums + o_row, mask=o_query < S, other=0.0)
        delta = tl.load(p_delta + o_row, mask=o_query < S, other=0.0)
        product = _products(q, k, scale, COSINE, PRECISION)
        score = _scores(
            product,
            p_bias,
            i_head,
            o_query,
            o_key,
            _seams(i_window, H, W, h, w),
            SHIFT_ROWS,
            SHIFT_COLUMNS,
            ROW,
            h,
            w,
        )
        weight = _weights(score, log_sum, COSINE)
        grad_weight = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_bias += weight * (grad_weight - delta[:, None])
    o_partial = (tl.program_id(0) * S + o_query[:, None]).to(tl.int64) * S + o_key[None, :]
    m_pair = (o_query < S)[:, None] & (o_key < S)[None, :]
    tl.store(p_partial + o_partial, grad_bias, mask=m_pair)


@kernel
@triton.jit
def _spread_table(
    p_table, p_bias, N, ROW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, T: tl.constexpr
):
    """The row of one query and head, of the bias of pairs."""
    i_head, i_query = tl.program_id(0) // (h * w), tl.program_id(0) % (h * w)
    o_key = tl.arange(0, T)
    row = i_query // w - o_key // w + (h - 1)
    column = i_query % w - o_key % w + (w - 1)
    o_table = (row * (2 * w - 1) + column) * N + i_head
    value = tl.load(p_table + o_table, mask=o_key < h * w, other=0.0)
    o_bias = tl.program_id(0).to(tl.int64) * ROW + o_key
    tl.store(p_bias + o_bias, value.to(p_bias.dtype.element_ty), mask=o_key < ROW)


@kernel
@triton.jit
def _sum_to_table(
    p_partial,
    p_grad,
    programs,
    N,
    h: tl.constexpr,
    w: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """The gradient of one entry of the table: of all pairs that are as far apart, a key each."""
    S: tl.constexpr = h * w
    i_head = tl.program_id(1)
    down = tl.program_id(0) // (2 * w - 1) - (h - 1)
    right = tl.program_id(0) % (2 * w - 1) - (w - 1)
    total = tl.zeros((R, T), dtype=tl.float32)
    for first_key in range(0, S, T):
        o_key = first_key + tl.arange(0, T)
        row, column = o_key // w + down, o_key % w + right
        m_key = (o_key < S) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
        o_pair = (row * w + column) * S + o_key
        for first in range(0, programs, R):
            o_program = first + tl.arange(0, R)
            o_partial = (o_program * N + i_head).to(tl.int64)[:, None] * (S * S) + o_pair[None, :]
            m_pair = (o_program < programs)[:, None] & m_key[None, :]
            total += tl.load(p_partial + o_partial, mask=m_pair, other=0.0)
    tl.store(p_grad + tl.program_id(0) * N + i_head, tl.sum(tl.sum(total, axis=1), axis=0))


def _plain_bias(bias: Tensor | None, qkv: Tensor, windows: Windows) -> tuple[Tensor, int]:
    """The bias of pairs for the programs that read it, and the length of its rows, 0 without one.

    It gets the dtype of qkv, as under autocast, and rows of whole 16 bytes: wide loads need that.
    """
    if bias is None:
        return qkv, 0
    N, S = windows.num_heads, math.prod(windows.window)
    wide = 16 // qkv.element_size()
    row = cdiv(S, wide) * wide
    if bias.dim() == 3 and row == S and bias.dtype == qkv.dtype:
        return bias, row
    plain = torch.empty(N, S, row, dtype=qkv.dtype, device=qkv.device)
    if bias.dim() == 2:
        h, w = windows.window
        T = max(next_power_of_2(row), 16)
        _spread_table[(N * S,)](bias, plain, N, ROW=row, h=h, w=w, T=T, num_warps=1)
    else:
        plain[..., :S] = bias
    return plain, row


def _settings(
    qkv: Tensor,
    row: int,
    windows: Windows,
    factors: Tensor | None,
) -> dict[str, Any]:
    width = qkv.shape[3] // (3 * windows.num_heads)
    return _constants(width, row, windows, factors is not None, product_precision(qkv.dtype))


@cache
def _constants(D: int, row: int, windows: Windows, cosine: bool, precision: str) -> dict[str, Any]:
    """What kernels know when they are compiled; not to be changed."""
    _, window, shift, _ = windows
    return {
        "SHIFT_ROWS": shift[0],
        "SHIFT_COLUMNS": shift[1],
        "ROW": row,
        "COSINE": cosine,
        "PRECISION": precision,
        "h": window[0],
        "w": window[1],
        "D": D,
        "K": max(16, next_power_of_2(D)),
    }


def is_tiled(S: int, dtype: torch.dtype) -> bool:
    """Whether a window is too large for one tile; float32 products take more registers."""
    largest = 32 if dtype == torch.float32 else 64
    return largest < S


def _tile_sides(dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a tile of a large window's scores."""
    return (32, 32) if dtype == torch.float32 else (64, 32)


def bias_programs(windows: int, num_heads: int, S: int, dtype: torch.dtype) -> int:
    """Partial sums of the bias's gradient, each over a share of the windows."""
    tiles = 1
    if is_tiled(S, dtype):
        M, T = _tile_sides(dtype)
        tiles = cdiv(S, M) * cdiv(S, T)
    return min(windows, max(PROGRAMS // (num_heads * tiles), 1))


def _partial(grad_bias: Tensor, programs: int, windows: Windows) -> Tensor:
    """Room for the bias's gradient of each program; that itself if one is all of it."""
    if grad_bias.dim() == 3 and programs == 1:
        return grad_bias
    S = math.prod(windows.window)
    return grad_bias.new_empty((programs, windows.num_heads, S, S))


def _add_partial(partial: Tensor, grad_bias: Tensor, windows: Windows) -> None:
    if partial is grad_bias:
        return
    programs, N, S, _ = partial.shape
    if grad_bias.dim() == 2:
        h, w = windows.window
        T = min(max(next_power_of_2(S), 16), 256)
        grid = ((2 * h - 1) * (2 * w - 1), N)
        _sum_to_table[grid](partial, grad_bias, programs, N, h=h, w=w, R=8, T=T, num_warps=2)
    else:
        pairs = N * S * S
        _sum_rows[(cdiv(pairs, 64),)](partial, grad_bias, programs, pairs, R=32, K=64, num_warps=4)


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    windows: Windows,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[B, H, W, C], and the logarithms of the sums of exponentials, float32 [B, H, W, N]."""
    B, H, W, C3 = qkv.shape
    N, scale, S = windows.num_heads, windows.scale, math.prod(windows.window)
    out = qkv.new_empty((B, H, W, C3 // 3))
    log_sums = qkv.new_empty((B, H, W, N), dtype=torch.float32)
    if out.numel() == 0:
        return out, log_sums
    plain_bias, row = _plain_bias(bias, qkv, windows)
    given = log_sums if factors is None else factors
    tensors = (qkv, plain_bias, given, out, log_sums, H, W, N, scale)
    settings = _settings(qkv, row, windows, factors)
    num_windows = B * H * W // S
    exact = qkv.dtype == torch.float32
    if not is_tiled(S, qkv.dtype):
        T = max(16, next_power_of_2(S))
        _attend_window[(num_windows * N,)](
            *tensors, **settings, T=T, num_warps=T // 8 if exact else max(T // 32, 1), num_stages=1
        )
    else:
        M = 64
        _attend_tile[(num_windows * N * cdiv(S, M),)](
            *tensors, **settings, M=M, T=32, num_warps=8 if exact else 4, num_stages=1
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv [B, H, W, 3C], the bias and the factors, the last two in float32.

    Those that are not wanted or of what is None are None.
    """
    B, H, W, _ = qkv.shape
    N, scale, S = windows.num_heads, windows.scale, math.prod(windows.window)
    grad_qkv = torch.empty_like(qkv)
    grad_bias = None
    if of_bias and bias is not None:
        grad_bias = qkv.new_empty(bias.shape, dtype=torch.float32)
    if qkv.numel() == 0:
        none = None if grad_bias is None else grad_bias.zero_()
        return grad_qkv, none, None if factors is None else torch.zeros_like(factors)
    plain_bias, row = _plain_bias(bias, qkv, windows)
    settings = _settings(qkv, row, windows, factors)
    given, along = log_sums, log_sums
    if factors is not None:
        given, along = factors, torch.empty_like(log_sums)
    num_windows = B * H * W // S
    exact = qkv.dtype == torch.float32
    if not is_tiled(S, qkv.dtype):
        T = max(16, next_power_of_2(S))
        programs, partial = num_windows, log_sums
        if grad_bias is not None:
            programs = bias_programs(num_windows, N, S, qkv.dtype)
            partial = _partial(grad_bias, programs, windows)
        _attend_window_backward[(programs * N,)](
            grad_out,
            qkv,
            plain_bias,
            given,
            log_sums,
            grad_qkv,
            along,
            partial,
            num_windows,
            programs,
            H,
            W,
            N,
            scale,
            OF_BIAS=of_bias,
            **settings,
            T=T,
            num_warps=T // 4 if exact else max(T // 16, 1),
            num_stages=1,
        )
    else:
        M, T = _tile_sides(qkv.dtype)
        delta = torch.empty_like(log_sums)
        _attend_tile_backward[(num_windows * N * cdiv(S, M),)](
            grad_out,
            qkv,
            plain_bias,
            given,
            out,
            log_sums,
            grad_qkv,
            along,
            delta,
            S,
            H,
            W,
            N,
            scale,
            OF_BIAS=of_bias,
            **settings,
            M=M,
            T=T,
            num_warps=8 if exact and settings["K"] > 32 else 4,
            num_stages=1,
        )
        if grad_bias is not None:
            tiles = (cdiv(S, M), cdiv(S, T))
            programs = bias_programs(num_windows, N, S, qkv.dtype)
            partial = _partial(grad_bias, programs, windows)
            _grad_bias_tile[(programs * N, *tiles)](
                grad_out,
                qkv,
                plain_bias,
                given,
                log_sums,
                delta,
                partial,
                num_windows,
                programs,
                H,
                W,
                N,
                scale,
                **settings,
                M=M,
                T=T,
                num_warps=4,
                num_stages=1,
            )
    if grad_bias is not None:
        _add_partial(partial, grad_bias, windows)
    if factors is None:
        return grad_qkv, grad_bias, None
    return grad_qkv, grad_bias, along.sum((0, 1, 2)) / factors
