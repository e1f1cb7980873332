"""Shifted-window attention in plain PyTorch.

B batch, H W token rows and columns, C width, N heads, K head width, h w sides of a window, S = h·w.
Source: microsoft/SimMIM models/swin_transformer.py (WindowAttention, SwinTransformerBlock), and for
the cosines microsoft/Swin-Transformer models/swin_transformer_v2.py.
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


def shift_mask(
    resolution: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """Keeps apart what the cyclic shift brought together: float32 [windows, S, S], 0 or -100."""
    rows = _regions(resolution[0], window[0], shift[0], device)
    columns = _regions(resolution[1], window[1], shift[1], device)
    regions = rows.unsqueeze(1) * 3 + columns  # [H, W]
    regions = _partition(regions[None, ..., None], window).flatten(1)  # [windows, S]
    differ = regions.unsqueeze(1) != regions.unsqueeze(2)
    return differ.float() * -100.0


def _regions(size: int, window: int, shift: int, device: torch.device | None) -> Tensor:
    """Per shifted row: 0, or 1 and 2 for the two parts of the last window."""
    row = torch.arange(size, device=device)
    if shift == 0:
        return torch.zeros_like(row)
    return (row >= size - window).long() + (row >= size - shift)


def _partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    B, H, W, C = x.shape
    h, w = window
    return x.view(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h * w, C)


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    factors: Tensor | None = None,
) -> Tensor:
    """qkv [B, H, W, 3C] with q, k, v head-major, bias [N, S, S] or None → [B, H, W, C].

    With factors [N], scores are those times the cosine of q and k in the place of scale · q·k.
    """
    if factors is not None:
        # Cosines times up to 100 need float32 until they are exponents.
        wide = torch.promote_types(qkv.dtype, torch.float32)
        with torch.autocast(qkv.device.type, enabled=False):
            unit = _with_lengths(qkv.to(wide), factors.to(wide))
            bias = None if bias is None else bias.to(wide)
            return window_attention(unit, bias, num_heads, window, shift, 1.0).to(qkv.dtype)
    q, k, v = split(qkv, num_heads, window, shift)
    pairs = bias_of_windows(bias, qkv.shape[1:3], num_heads, window, shift, qkv.device)
    if pairs is not None:
        pairs = pairs.unsqueeze(0).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale)
    return join(out, qkv.shape[1:3], num_heads, window, shift)


def _with_lengths(qkv: Tensor, factors: Tensor) -> Tensor:
    """qkv with every q as long as its head's factor, and every k of length 1."""
    N = len(factors)
    parts = qkv.view(*qkv.shape[:3], 3, N, qkv.shape[3] // (3 * N))
    q, k, v = parts.unbind(3)  # [B, H, W, N, K] each
    q = F.normalize(q, dim=-1) * factors.unsqueeze(1)
    return torch.stack((q, F.normalize(k, dim=-1), v), dim=3).view(qkv.shape)


def split(
    qkv: Tensor, num_heads: int, window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each [B, windows·N, S, K]: one axis for windows and heads.

    A bias of [1, windows·N, S, S] then serves the whole batch.
    """
    B, H, W, C3 = qkv.shape
    h, w = window
    N, K = num_heads, C3 // (3 * num_heads)
    if shift != (0, 0):
        qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
    # [B, H/h, h, W/w, w, 3, N, K] → [3, B, H/h, W/w, N, h, w, K]
    qkv = qkv.view(B, H // h, h, W // w, w, 3, N, K).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = qkv.reshape(3, B, (H // h) * (W // w) * N, h * w, K).unbind(0)
    return q, k, v


def bias_of_windows(
    bias: Tensor | None,
    resolution: tuple[int, int] | torch.Size,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """What is added to scores, [windows·N, S, S]: position bias and shift mask; None is nothing."""
    H, W = resolution
    windows, pairs = (H // window[0]) * (W // window[1]), window[0] * window[1]
    if shift == (0, 0):
        if bias is None:
            return None
        return bias.expand(windows, -1, -1, -1).reshape(windows * num_heads, pairs, pairs)
    mask = shift_mask((H, W), window, shift, device).unsqueeze(1)  # [windows, 1, S, S]
    both = mask.expand(-1, num_heads, -1, -1) if bias is None else bias + mask
    return both.reshape(windows * num_heads, pairs, pairs)


def join(
    out: Tensor,
    resolution: tuple[int, int] | torch.Size,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> Tensor:
    """The inverse of `split` for attended values: [B, windows·N, S, K] → [B, H, W, C]."""
    (H, W), (h, w) = resolution, window
    B, K = out.shape[0], out.shape[3]
    out = out.reshape(B, H // h, W // w, num_heads, h, w, K).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, H, W, num_heads * K)
    return out if shift == (0, 0) else out.roll(shift, (1, 2))
