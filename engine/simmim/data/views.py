"""The view of pre-training: random crop, resize and flip."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.config.sections import Config
from simmim.data.augment import Augmentation, augment, centre_view, sample_key
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


class View(Protocol):
    """Makes the array of an encoded image, a pure function of (data, epoch, sample).

    Attributes:
        shape: of the array.
        dtype: NumPy's name of its type.
    """

    shape: tuple[int, ...]
    dtype: str

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """Write the view of sample `sample` in epoch `epoch`; raises UnreadableImage."""


VIEWS = 2


def crop_epoch(epoch: int, view: int) -> int:
    """The epoch whose single crop is view `view` of epoch `epoch`."""
    return VIEWS * epoch + view


class TwoViews(CroppedView):
    """Two random crops of every image, uint8 [2, H, W, C]; see `CroppedView`."""

    leading = (VIEWS,)

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `View`; the image is decoded once."""
        image = self.decoded(data)
        for view in range(VIEWS):
            key = sample_key(self.seed, crop_epoch(epoch, view), sample)
            augment(image, key, self.augmentation, out[view])


class CentreView:
    """The largest central crop of every image, uint8 [H, W, C]; nothing is drawn; a `View`.

    Args:
        config: of the run.
    """

    dtype = "uint8"

    def __init__(self, config: Config) -> None:
        self.data, self.size = config.data, config.image_size
        self.shape: tuple[int, ...] = (*config.image_size, config.data.channels)

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `simmim.data.views.View`; the same in every epoch."""
        image = decode(
            data,
            self.data.channels,
            max_pixels=self.data.max_pixels,
            value_range=self.data.value_range,
        )
        out[...] = centre_view(image, self.size)
