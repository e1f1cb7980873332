"""Linear head and masked L1 loss, one after the other, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.masked_l1_loss import reference


def linear_masked_l1_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    mask: Tensor,
    stride: int,
    norm_target: int | None,
) -> Tensor:
    """features [B, h, w, D], weight [C·s·s, D], bias [C·s·s] or None, image [B, C, h·s, w·s]."""
    prediction = F.linear(features, weight, bias)
    shuffled = reference.shuffle_pixels(prediction, stride)
    return reference.masked_l1_loss(shuffled, image, mask, norm_target)


def hidden_cells(mask: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Cells of `stride` pixels with a hidden pixel: bool [B, gh, gw] → bool [B, h, w]."""
    for dim, size in ((1, grid[0]), (2, grid[1])):
        cell = size * stride // mask.shape[dim]  # pixels of a mask cell
        if cell % stride == 0:
            mask = mask.repeat_interleave(cell // stride, dim)
            continue
        if stride % cell:  # neither divides the other: down to single pixels first
            mask, cell = mask.repeat_interleave(cell, dim), 1
        blocks = (*mask.shape[:dim], size, stride // cell, *mask.shape[dim + 1 :])
        mask = mask.reshape(blocks).any(dim + 1)
    return mask
