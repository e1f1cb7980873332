"""Which tokens of each image are hidden: a pure function of (seed, epoch, sample id)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose
from simmim_kernels.op import Op
from simmim_kernels.random_patch_mask import reference
from simmim_kernels.splitmix import fold, signed

__all__ = ["BACKENDS", "random_patch_mask"]

# Keeps the mask's draws apart from those of other uses of the same (seed, epoch, id).
STREAM = 0x6D61736B  # "mask"
# Units that one Triton program sorts in registers.
TRITON_UNITS = 4096


def random_patch_mask(
    batch: int,
    grid: tuple[int, int],
    *,
    ratio: float = 0.6,
    unit: int = 1,
    seed: int,
    ids: Tensor | Sequence[int] | None = None,
    epoch: int | Tensor = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Hide exactly ceil(units · ratio) units of each image, uniformly at random.

    The mask of an image depends on (seed, epoch, id) and on nothing else: not on the device, the
    batch it came in or the number of processes. It is computed on the device without reading
    anything back.

    Args:
        batch: B, the number of images.
        grid: (h, w), tokens along height and width.
        ratio: share of hidden units, 0 to 1; the product with the number of units is rounded up.
        unit: side of a mask unit in tokens; divides h and w (32 px units and 4 px patches: 8).
        seed: any integer.
        ids: int64 [B], the samples; 0 … B-1 when None.
        epoch: one integer, or int64 [B] when the batch spans epochs.
        device: where the mask is made; that of `ids` (or the default device) when None.
        backend: "triton" (GPU), "native" (CPU) or "reference", which make the same mask; None
            takes the first that can run.

    Returns:
        bool [B, h, w] on `device`; True marks a hidden token. No gradient.

    Raises:
        ValueError: the unit does not divide the grid, the ratio is outside 0 … 1, or the number
            of ids or epochs is not `batch`.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: counts and units as microsoft/SimMIM data/data_simmim.py (MaskGenerator); the draw is
        ours.
    """
    height, width = grid
    if unit < 1 or height % unit or width % unit:
        raise ValueError(f"unit={unit} does not divide the token grid {height}×{width}")
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio={ratio} is outside 0 … 1")
    if device is None and isinstance(ids, Tensor):
        device = ids.device
    if ids is None:
        ids = torch.arange(batch, device=device)
    ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device=ids.device)
    if ids.shape != (batch,) or epochs.shape not in ((), (batch,)):
        raise ValueError(
            f"ids {tuple(ids.shape)} and epoch {tuple(epochs.shape)} must be [{batch}]"
        )
    rows, columns = height // unit, width // unit
    # the product in float64, as the published generator takes it: some ratios land a hair above
    # an integer and hide one unit more
    num_hidden = math.ceil(rows * columns * ratio)
    key = signed(fold(STREAM, seed))
    backends = BACKENDS if rows * columns <= TRITON_UNITS else BACKENDS[1:]
    chosen = choose("random_patch_mask", backends, (ids, epochs), backend)
    if chosen == "reference":
        return reference.random_patch_mask(ids, epochs, key, rows, columns, unit, num_hidden)
    return _draw(chosen, ids, epochs, key, rows, columns, unit, num_hidden)


def _shapes(
    ids: Tensor, epochs: Tensor, key: int, rows: int, columns: int, unit: int, num_hidden: int
) -> Tensor:
    return ids.new_empty((ids.shape[0], rows * unit, columns * unit), dtype=torch.bool)


_draw = Op("random_patch_mask", _shapes)
