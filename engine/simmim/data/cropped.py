"""The view of pre-training: random crop, resize and flip."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.decode import MAX_PIXELS, decode


class CroppedView:
    """A random crop of every image, uint8 [H, W, C].

    Args:
        augmentation: what is drawn per sample.
        seed: the run's seed.
        max_pixels: larger images are refused.
        value_range: see `decode`.
    """

    dtype = "uint8"
    leading: tuple[int, ...] = ()  # axes before those of a crop

    def __init__(
        self,
        augmentation: Augmentation,
        seed: int,
        *,
        max_pixels: int = MAX_PIXELS,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.augmentation, self.seed = augmentation, seed
        self.max_pixels, self.value_range = max_pixels, value_range
        size = (*augmentation.size, augmentation.channels)
        self.shape: tuple[int, ...] = (*self.leading, *size)

    def decoded(self, data: bytes) -> NDArray[np.uint8]:
        """The whole image, uint8 [H, W, C]; raises UnreadableImage."""
        return decode(
            data,
            self.augmentation.channels,
            max_pixels=self.max_pixels,
            value_range=self.value_range,
        )

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `View`; every draw is keyed, nothing is remembered."""
        augment(self.decoded(data), sample_key(self.seed, epoch, sample), self.augmentation, out)
