"""Stochastic depth as integer arithmetic that every device repeats exactly."""

import torch
from torch import Tensor

from simmim_kernels.splitmix import GAMMA, fold_tensor, mix_tensor, signed


def random_branch_scales(
    ids: Tensor, epochs: Tensor, key: int, threshold: int, kept: float, branches: int
) -> Tensor:
    """float32 [branches, B]: `kept` where the upper 53 bits of a draw are `threshold` or more."""
    keys = fold_tensor(fold_tensor(key, epochs), ids)
    counter = torch.arange(1, branches + 1, device=ids.device) * signed(GAMMA)
    draws = mix_tensor(keys + counter[:, None])
    bits = (draws >> 11) & ((1 << 53) - 1)
    return (bits >= threshold).float() * kept
