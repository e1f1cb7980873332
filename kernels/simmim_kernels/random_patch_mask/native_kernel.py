"""Calls the C++ kernel of random_patch_mask with the addresses of tensors."""

import torch
from torch import Tensor

from simmim_kernels import native


def forward(
    ids: Tensor, epochs: Tensor, key: int, rows: int, columns: int, unit: int, num_hidden: int
) -> Tensor:
    """bool [B, rows·unit, columns·unit]; ids int64 [B], epochs int64 [B] or []."""
    assert native.extension is not None
    batch = ids.shape[0]
    mask = native.empty((batch, rows * unit, columns * unit), torch.bool)
    # waking threads costs as much as a few hundred thousand tokens
    threads = min(torch.get_num_threads(), 1 + mask.numel() // 1_000_000)
    native.extension.random_patch_mask(
        ids.data_ptr(),
        epochs.data_ptr(),
        min(epochs.dim(), 1),
        batch,
        rows,
        columns,
        unit,
        num_hidden,
        key,
        mask.data_ptr(),
        threads,
    )
    return mask
