"""Which mask units of each sample are hidden: a pure function of (seed, epoch, sample)."""

from torch import Tensor

from simmim_kernels import random_patch_mask


def sample_mask(
    ids: Tensor,
    epochs: Tensor,
    grid: tuple[int, int],
    *,
    patch_size: int,
    mask_unit: int,
    ratio: float,
    seed: int,
    backend: str | None = None,
) -> Tensor:
    """Draw the mask of each sample in whole units, on the device of `ids`.

    Args:
        ids: int64 [B], sample ids. A negative id marks an empty slot (an unreadable image): nothing
            of it is hidden, so that it adds nothing to the loss.
        epochs: int64 [B], the epoch each sample belongs to.
        grid: (h, w) in tokens.
        patch_size: side of a token in pixels.
        mask_unit: side of a mask unit in pixels; a multiple of patch_size.
        ratio: share of units that are hidden, rounded up to whole units.
        seed: the run's seed.
        backend: backend of `random_patch_mask`; all make the same mask.

    Returns:
        bool [B, h·patch_size/mask_unit, w·patch_size/mask_unit], where True marks a hidden unit.
        The model spreads it over tokens, and the loss takes it as it is.

    Raises:
        ValueError: the units do not tile the grid.
    """
    unit = mask_unit // patch_size
    if unit * patch_size != mask_unit or grid[0] % unit or grid[1] % unit:
        raise ValueError(
            f"mask units of {mask_unit} px do not tile {grid[0]}×{grid[1]} tokens of "
            f"{patch_size} px"
        )
    units = (grid[0] // unit, grid[1] // unit)
    mask = random_patch_mask(
        len(ids), units, ratio=ratio, seed=seed, ids=ids, epoch=epochs, backend=backend
    )
    return mask & (ids >= 0).view(-1, 1, 1)
