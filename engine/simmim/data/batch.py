"""A batch of images on the device."""

from dataclasses import dataclass

import torch
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

    def without_empty_slots(self, at_least: int = 1) -> "Batch":
        """The same images without empty slots, for a module that would see their zeros.

        The device is not asked which slots are empty: `num_valid` tells how many to keep.

        Args:
            at_least: images that stay, empty ones among them where there are no more.
        """
        if self.num_valid == len(self.ids):
            return self
        kept = (self.ids < 0).to(torch.uint8).argsort(stable=True)[: max(at_least, self.num_valid)]
        return Batch(self.image[kept], self.ids[kept], self.epochs[kept], self.num_valid)
