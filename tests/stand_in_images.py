"""Images that need no decoding: a source and a view of which every number is known."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.decode import UnreadableImage
from simmim.data.source import PackedStrings


class StandInSource:
    """`count` images whose bytes are their numbers, and some that cannot be decoded."""

    def __init__(self, count: int, broken: set[int] | frozenset[int] = frozenset()) -> None:
        self.names = PackedStrings([f"{number}.jpg" for number in range(count)])
        self.broken = broken

    def read(self, index: int) -> bytes:
        return b"broken" if index in self.broken else str(index).encode()


class StandInView:
    """An image's array is [1 + its number, its epoch, the sample's number]."""

    shape: tuple[int, ...] = (3,)
    dtype = "int32"

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        out[0] = -1  # what a decoder leaves of an image that ends inside
        if data == b"broken":
            raise UnreadableImage(f"{sample} is broken")
        out[:] = np.array([1 + int(data), epoch, sample])
