"""Random mask of whole units per image, as integer arithmetic that every device repeats exactly."""

import math

import torch
from torch import Tensor

from simmim_kernels.splitmix import GAMMA, fold, fold_tensor, mix_tensor, signed

# Keeps the mask's draws apart from those of other uses of the same (seed, epoch, id).
STREAM = 0x6D61736B  # "mask"


def random_patch_mask(
    ids: Tensor, epochs: Tensor, grid: tuple[int, int], ratio: float, unit: int, seed: int
) -> Tensor:
    """Hide the units with the smallest random keys. ids, epochs: int64 [B] → bool [B, h, w]."""
    rows, columns = grid[0] // unit, grid[1] // unit
    num_units = rows * columns
    # the product in float64, as the published generator takes it: some ratios land a hair above
    # an integer and hide one unit more
    num_hidden = math.ceil(num_units * ratio)
    key = fold_tensor(fold_tensor(fold(STREAM, seed), epochs), ids)  # [B]
    counter = torch.arange(1, num_units + 1, device=ids.device) * signed(GAMMA)
    draws = mix_tensor(key[:, None] + counter)  # [B, num_units]
    # a stable sort settles equal draws by position, alike on every device
    order = torch.argsort(draws, dim=1, stable=True)
    hidden = torch.zeros(len(ids), num_units, dtype=torch.bool, device=ids.device)
    hidden.scatter_(1, order[:, :num_hidden], True)
    hidden = hidden.view(-1, rows, 1, columns, 1).expand(-1, rows, unit, columns, unit)
    return hidden.reshape(-1, *grid)
