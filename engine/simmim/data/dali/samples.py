"""Reads samples, and decides whether DALI or the CPU path decodes each of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import augment, crop_box, is_flipped
from simmim.data.decode import Header, UnreadableImage, decode, read_header
from simmim.data.source import Source, is_machine_fault
from simmim.data.views import RandomCrops

# Where the end marker is further from the end, the file is truncated or the CPU path decides.
TAIL_BYTES = 64
END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class PreparedSample:
    """A sample that was read: bytes for DALI, or the view, or why there is neither.

    Attributes:
        epoch: of the sample.
        sample: its number.
        data: encoded bytes for DALI; empty where the CPU path made the view.
        pixels: of the whole image.
        box: (left, top, width, height) of the crop, pixels.
        flip: whether the crop is mirrored.
        view: uint8 [H, W, C], made by the CPU path.
        problem: why the image cannot be read; "" where it can.
    """

    epoch: int
    sample: int
    data: bytes = b""
    pixels: int = 0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False
    view: NDArray[np.uint8] | None = None
    problem: str = ""


class Preparation:
    """Reads samples and decides who decodes them.

    Args:
        source: images; read by several threads at once.
        crops: what is drawn; one per sample.
        largest_pixels: pixels, and bytes, of the largest image that DALI is given.

    Attributes:
        made_here: samples that DALI failed on although they can be read; the CPU path makes them.
        orientations: of EXIF, those that DALI decodes as the CPU path does.
    """

    def __init__(self, source: Source, crops: RandomCrops, largest_pixels: int) -> None:
        self.source, self.crops, self.largest_pixels = source, crops, largest_pixels
        self.made_here: set[int] = set()
        self.orientations: frozenset[int] = frozenset()

    def prepare(self, epoch: int, sample: int) -> PreparedSample:
        """Read a sample, and its view where the CPU path makes it."""
        try:
            data = self.source.read(sample)
        except OSError as error:
            if is_machine_fault(error):
                raise
            return PreparedSample(epoch, sample, problem=error.strerror or repr(error))
        try:
            header = read_header(data)
        except UnreadableImage as error:
            problem = str(error) if data else "the file is empty"
            return PreparedSample(epoch, sample, problem=problem)
        if not self.suits_dali(data, header) or sample in self.made_here:
            return self.make_here(epoch, sample, data)
        key, drawn = self.crops.key(epoch, 0, sample), self.crops.augmentation
        return PreparedSample(
            epoch,
            sample,
            data,
            header.width * header.height,
            crop_box(key, *header.upright_size, drawn.scale, drawn.ratio),
            is_flipped(key, drawn.flip),
        )

    def make_here(self, epoch: int, sample: int, data: bytes) -> PreparedSample:
        """A sample's view by the CPU path."""
        crops = self.crops
        try:
            image = decode(
                data,
                crops.augmentation.channels,
                max_pixels=crops.max_pixels,
                value_range=crops.value_range,
            )
        except UnreadableImage as error:
            return PreparedSample(epoch, sample, problem=str(error))
        view = augment(image, crops.key(epoch, 0, sample), crops.augmentation)
        return PreparedSample(epoch, sample, view=view)

    def suits_dali(self, data: bytes, header: Header) -> bool:
        """Whether DALI decodes an image as the CPU path does, within its share of memory."""
        return (
            header.plain
            and header.orientation in self.orientations
            and header.width * header.height <= min(self.largest_pixels, self.crops.max_pixels)
            and len(data) <= self.largest_pixels
            # DALI may decode what there is of a truncated file
            and data.rfind(END_OF_IMAGE, len(data) - TAIL_BYTES) >= 0
        )
