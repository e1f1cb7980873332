"""Two random crops of every image, for methods that compare views.

View v (0 or 1) of a sample in epoch e is cropped and flipped as the one view of epoch 2·e + v would
be: both are draws of the same kind, and of no other than any two epochs make. Colour and blur
follow on the device (`simmim.data.distortion`).
"""

from typing import Any

from numpy.typing import NDArray

from simmim.data.augment import augment, sample_key
from simmim.data.cropped import CroppedView

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
