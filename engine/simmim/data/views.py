"""The views of pre-training: what makes the array of an encoded image."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.config.sections import Config
from simmim.data.augment import Augmentation, augment, centre_view, sample_key
from simmim.data.decode import MAX_PIXELS, decode

VIEWS = 2


class View(Protocol):
    """Makes the array of an encoded image, a pure function of (data, epoch, sample).

    A view whose arrays are random crops and nothing else may say so by an attribute `crops`, see
    `crops_of`.

    Attributes:
        shape: of the array.
        dtype: NumPy's name of its type.
    """

    shape: tuple[int, ...]
    dtype: str

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """Write the view of sample `sample` in epoch `epoch`; raises UnreadableImage."""


@dataclass(frozen=True)
class RandomCrops:
    """Everything that decides over a sample's random crops, for a decoder that makes them itself.

    Attributes:
        augmentation: what is drawn per crop.
        seed: the run's seed.
        max_pixels: larger images are refused.
        value_range: see `simmim.data.decode.decode`.
        per_sample: number of crops of a sample.
    """

    augmentation: Augmentation
    seed: int
    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None
    per_sample: int = 1

    def epoch_of(self, epoch: int, number: int) -> int:
        """The epoch whose single crop is crop number `number` of a sample in epoch `epoch`."""
        return self.per_sample * epoch + number

    def key(self, epoch: int, number: int, sample: int) -> int:
        """What the draws of crop number `number` follow; see `simmim.data.augment.augment`."""
        return sample_key(self.seed, self.epoch_of(epoch, number), sample)


def crops_of(view: View) -> RandomCrops | None:
    """The random crops that a view's arrays are; None where they are anything else."""
    crops = getattr(view, "crops", None)
    return crops if isinstance(crops, RandomCrops) else None


class CroppedView:
    """A random crop of every image, uint8 [H, W, C].

    Args:
        augmentation: what is drawn per sample.
        seed: the run's seed.
        max_pixels: larger images are refused.
        value_range: see `decode`.
    """

    dtype = "uint8"
    crops_per_sample = 1

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
        several = (self.crops_per_sample,) if self.crops_per_sample > 1 else ()
        self.shape: tuple[int, ...] = (*several, *augmentation.size, augmentation.channels)

    @property
    def crops(self) -> RandomCrops | None:
        """See `crops_of`; None for a subclass that makes its arrays by a method of its own."""
        inherited = all(
            getattr(type(self), name) is getattr(CroppedView, name) for name in ("fill", "decoded")
        )
        return self._random_crops() if inherited else None

    def _random_crops(self) -> RandomCrops:
        return RandomCrops(
            self.augmentation, self.seed, self.max_pixels, self.value_range, self.crops_per_sample
        )

    def decoded(self, data: bytes) -> NDArray[np.uint8]:
        """The whole image, uint8 [H, W, C]; raises UnreadableImage."""
        return decode(
            data,
            self.augmentation.channels,
            max_pixels=self.max_pixels,
            value_range=self.value_range,
        )

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `View`; every draw is keyed, nothing is remembered. The image is decoded once."""
        image, crops = self.decoded(data), self._random_crops()
        for number, crop in enumerate(out if crops.per_sample > 1 else out[None]):
            augment(image, crops.key(epoch, number, sample), crops.augmentation, crop)


class TwoViews(CroppedView):
    """Two random crops of every image, uint8 [2, H, W, C]; see `CroppedView`."""

    crops_per_sample = VIEWS


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
