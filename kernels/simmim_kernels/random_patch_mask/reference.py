"""Random mask of whole units per image, as integer arithmetic that every device repeats exactly."""

import torch
from torch import Tensor

from simmim_kernels.splitmix import GAMMA, fold_tensor, mix_tensor, signed


def random_patch_mask(
    ids: Tensor, epochs: Tensor, key: int, rows: int, columns: int, unit: int, num_hidden: int
) -> Tensor:
    """Hide the units with the smallest random keys.

    ids int64 [B], epochs int64 [B] or [] → bool [B, rows·unit, columns·unit]; `key` stands for
    stream and seed.
    """
    num_units = rows * columns
    keys = fold_tensor(fold_tensor(key, epochs.expand(ids.shape)), ids)  # [B]
    counter = torch.arange(1, num_units + 1, device=ids.device) * signed(GAMMA)
    draws = mix_tensor(keys[:, None] + counter)  # [B, num_units]
    # no two draws are equal, since mixing is a bijection: every device finds the same order
    order = torch.argsort(draws, dim=1)
    hidden = torch.zeros(len(ids), num_units, dtype=torch.bool, device=ids.device)
    hidden.scatter_(1, order[:, :num_hidden], True)
    hidden = hidden.view(-1, rows, 1, columns, 1).expand(-1, rows, unit, columns, unit)
    return hidden.reshape(-1, rows * unit, columns * unit)
