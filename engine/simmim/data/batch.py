"""A batch of images on the device."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one backward pass, on the device.

    Attributes:
        image: [B, *shape] as the view makes it, such as uint8 [B, H, W, C]; zeros in empty slots.
        ids: int64 [B]; -1 in empty slots (unreadable images).
        epochs: int64 [B].
        num_valid: slots that hold an image; known on the host.
    """

    image: Tensor
    ids: Tensor
    epochs: Tensor
    num_valid: int
