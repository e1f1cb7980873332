"""Which tokens of each sample are hidden: a pure function of (seed, epoch, sample)."""

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
) -> Tensor:
    """Token mask of each sample, made on the device of `ids`.

    Args:
        ids: int64 [B], sample ids; a negative id marks an empty slot (an unreadable image), of
            which nothing is hidden, so that it adds nothing to the loss.
        epochs: int64 [B], the epoch each sample belongs to.
        grid: (h, w) in tokens.
        patch_size: side of a token in pixels.
        mask_unit: side of a mask unit in pixels; a multiple of patch_size.
        ratio: share of units that are hidden, rounded up to whole units.
        seed: the run's seed.

    Returns:
        bool [B, h, w], True marks a hidden token.
    """
    mask = random_patch_mask(
        len(ids), grid, ratio=ratio, unit=mask_unit // patch_size, seed=seed, ids=ids, epoch=epochs
    )
    return mask & (ids >= 0).view(-1, 1, 1)
