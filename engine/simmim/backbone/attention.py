"""Attention of every backbone; the only module that calls attention kernels.

B batch, H W token rows and columns, C width, N heads, K head width, S tokens of a window,
nW windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_position_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Bias of every pair of positions in a window, from the table of relative positions.

    Args:
        table: [(2h-1)·(2w-1), N]; row (r - r' + h - 1)·(2w-1) + (c - c' + w - 1) holds the bias of
            query (r, c) and key (r', c').
        window: (h, w) in tokens.

    Returns:
        [N, h·w, h·w]. The gradient is summed in a fixed order (no atomics), so that training is
        reproducible bit for bit.
    """
    h, w = window
    grid = table.view(2 * h - 1, 2 * w - 1, -1)
    # The row of a pair is r + (h - 1 - r'): windows of length h that start at r, read backwards.
    # Same numbers as indexing with the published relative_position_index, but the backward of
    # `unfold` is a gather, where that of indexing is a scatter with atomic adds.
    pairs = grid.unfold(0, h, 1).unfold(1, w, 1)  # [r, c, N, h - 1 - r', w - 1 - c']
    pairs = pairs.flip(3, 4).permute(2, 0, 1, 3, 4)
    return pairs.reshape(-1, h * w, h * w)


def relative_position_bias_with_cls(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """As `relative_position_bias`, with a leading class token. → [N, 1 + h·w, 1 + h·w].

    The last three rows of the table are class-to-patch, patch-to-class and class-to-class.
    """
    patches = relative_position_bias(table[:-3], grid)  # [N, L, L]
    num_heads, length, _ = patches.shape
    cls_to_patch, patch_to_cls, cls_to_cls = table[-3:].unbind(0)  # [N] each
    left = patch_to_cls.view(-1, 1, 1).expand(num_heads, length, 1)
    top = torch.cat(
        [cls_to_cls.view(-1, 1, 1), cls_to_patch.view(-1, 1, 1).expand(num_heads, 1, length)], 2
    )
    return torch.cat([top, torch.cat([left, patches], 2)], 1)


def shift_mask(
    resolution: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """Keeps apart what the cyclic shift brought together: float32 [nW, S, S], 0 or -100.

    Source: microsoft/SimMIM models/swin_transformer.py (the published value is -100, not -inf).
    """
    regions = torch.zeros(resolution)
    number = 0
    for rows in _bands(window[0], shift[0]):
        for columns in _bands(window[1], shift[1]):
            regions[rows, columns] = number
            number += 1
    windows = partition(regions[None, :, :, None], window).flatten(1)  # [nW, S]
    differ = windows.unsqueeze(1) != windows.unsqueeze(2)
    return differ.float() * -100.0


def _bands(window: int, shift: int) -> list[slice]:
    if shift == 0:
        return [slice(None)]
    return [slice(0, -window), slice(-window, -shift), slice(-shift, None)]


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, H, W, C] → [B·nW, h·w, C], windows in row-major order."""
    B, H, W, C = x.shape
    h, w = window
    x = x.view(B, H // h, h, W // w, w, C).transpose(2, 3)
    return x.reshape(-1, h * w, C)


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    *,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Shifted-window self-attention with a relative position bias.

    Args:
        qkv: [B, H, W, 3C], rows of q, then k, then v, each head-major.
        bias: [N, S, S].
        mask: [nW, S, S] from `shift_mask`, or None where nothing is shifted.
        num_heads: N; divides C.
        window: (h, w); divides (H, W). S = h·w.
        shift: rows and columns of the cyclic shift.
        scale: factor of q·k.

    Returns:
        [B, H, W, C].
    """
    B, H, W, C3 = qkv.shape
    h, w = window
    N, K = num_heads, C3 // (3 * num_heads)
    if mask is not None:
        qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
    # [B, H/h, h, W/w, w, 3, N, K] → [3, B, H/h, W/w, N, h, w, K]
    qkv = qkv.view(B, H // h, h, W // w, w, 3, N, K).permute(5, 0, 1, 3, 6, 2, 4, 7)
    # windows and heads share one axis: a bias of [1, nW·N, S, S] then serves the whole batch
    q, k, v = qkv.reshape(3, B, -1, h * w, K).unbind(0)
    num_windows = (H // h) * (W // w)
    if mask is None:
        pair_bias = bias.expand(num_windows, -1, -1, -1)
    else:
        pair_bias = bias + mask.unsqueeze(1).to(bias.dtype)
    pair_bias = pair_bias.reshape(1, num_windows * N, h * w, h * w).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=pair_bias, scale=scale)
    out = out.view(B, H // h, W // w, N, h, w, K).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, H, W, N * K)
    return out if mask is None else out.roll(shift, (1, 2))


def global_attention(qkv: Tensor, bias: Tensor | None, *, num_heads: int, scale: float) -> Tensor:
    """Self-attention over all tokens. qkv [B, L, 3C], bias [N, L, L] or None → [B, L, C]."""
    B, L, C3 = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if bias is not None:
        bias = bias.unsqueeze(0).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).reshape(B, L, C3 // 3)
