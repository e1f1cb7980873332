"""Two random crops of every image, for methods that compare views.

View v (0 or 1) of a sample in epoch e is cropped and flipped as the one view of epoch 2·e + v would
be: both are draws of the same kind, and of no other than any two epochs make. Colour and blur
follow on the device (`simmim.data.distortion`).
"""

from typing import Any

from numpy.typing import NDArray

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.decode import MAX_PIXELS, decode

VIEWS = 2


def crop_epoch(epoch: int, view: int) -> int:
    """The epoch whose single crop is view `view` of epoch `epoch`."""
    return VIEWS * epoch + view


class TwoViews:
    """Two random crops of every image, uint8 [2, H, W, C]; a `simmim.data.producer.View`.

    Args:
        augmentation: what is drawn per view.
        seed: the run's seed.
        max_pixels: larger images are refused.
        value_range: see `decode`.
    """

    dtype = "uint8"

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
        self.shape: tuple[int, ...] = (VIEWS, *augmentation.size, augmentation.channels)

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `View`; the image is decoded once."""
        image = decode(
            data,
            self.augmentation.channels,
            max_pixels=self.max_pixels,
            value_range=self.value_range,
        )
        for view in range(VIEWS):
            key = sample_key(self.seed, crop_epoch(epoch, view), sample)
            augment(image, key, self.augmentation, out[view])
