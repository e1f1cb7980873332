"""Patch merging in plain PyTorch. Under autocast each operation casts as autocast casts it."""

import torch.nn.functional as F
from torch import Tensor


def merge_patches(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """x [B, H, W, C], norm_weight and norm_bias [4C], weight [M, 4C] → [B, H/2, W/2, M]."""
    B, H, W, C = x.shape
    # the published order of the neighbours is (0,0), (1,0), (0,1), (1,1): column, then row
    x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5)
    x = x.reshape(B, H // 2, W // 2, 4 * C)
    return F.linear(F.layer_norm(x, x.shape[3:], norm_weight, norm_bias, eps), weight)
