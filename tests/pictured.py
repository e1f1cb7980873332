"""Images of one colour that tell their number, for tests of pictures."""

import io

import numpy as np

from simmim.data.source import PackedStrings


class Squares:
    """A source of grey squares: image n has the value 5·n + 7 everywhere.

    Args:
        count: of images.

    Attributes:
        broken: images whose bytes are none of an image.
        gone: images that cannot be read.
        tried: those that were read, in order.
    """

    def __init__(self, count: int) -> None:
        self.names = PackedStrings([f"{number}.npy" for number in range(count)])
        self.broken: set[int] = set()
        self.gone: set[int] = set()
        self.tried: list[int] = []

    def read(self, index: int) -> bytes:
        """See `Source`."""
        self.tried.append(index)
        if index in self.gone:
            raise OSError("gone")
        if index in self.broken:
            return b"no image"
        file = io.BytesIO()
        np.save(file, np.full((24, 24, 3), value_of(index), dtype=np.uint8))
        return file.getvalue()


def value_of(number: int) -> int:
    """The value of every pixel of an image."""
    return 5 * number + 7
