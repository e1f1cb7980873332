"""An image as it is packed: downscaled, upright, and small."""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from simmim.data.augment import resized
from simmim.data.decode import UnreadableImage, decode, read_header
from simmim.packing.options import Options

# JPEG's own limit is 65535.
MAX_JPEG_SIDE = 65500

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


class Encoded(NamedTuple):
    """An image as it is packed; sizes are upright."""

    data: bytes
    extension: str
    width: int
    height: int
    channels: int


class TooLarge(UnreadableImage):
    """An image with more pixels than the limit; the message is its size."""


def encode(data: bytes, options: Options) -> Encoded:
    """An image as it is packed: downscaled, upright, as JPEG where 1 or 3 channels allow it.

    Downscaling is Lanczos with antialiasing, as Pillow does it. A plain JPEG (grey, YCbCr or RGB)
    that is small and upright keeps its bytes. 2 and 4 channels become PNG, more .npy [H, W, C].

    Raises:
        UnreadableImage: no complete image, or one of too many pixels.
    """
    header = read_header(data)
    if header.width * header.height > options.max_pixels:
        raise TooLarge(f"{header.width}×{header.height}")
    pixels = decode(
        data,
        options.channels,
        max_pixels=options.max_pixels,
        value_range=options.value_range,
    )
    height, width, channels = pixels.shape
    if options.keep_originals:
        extension = _EXTENSIONS.get(header.format, header.format.lower())
        return Encoded(data, extension, width, height, channels)
    short, side = min(width, height), options.short_side or 0
    if short > side:
        # rounded half up, in integers: the same on every machine
        width, height = ((2 * length * side + short) // (2 * short) for length in (width, height))
        pixels = resized(
            pixels, (0, 0, pixels.shape[1], pixels.shape[0]), (height, width), filter="lanczos"
        )
    elif header.plain and header.orientation == 1 and header.channels == channels:
        return Encoded(data, "jpg", width, height, channels)
    if channels > 4:
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        return Encoded(buffer.getvalue(), "npy", width, height, channels)
    if channels in (1, 3) and max(width, height) <= MAX_JPEG_SIDE:
        colour, sampling = ("GRAY", "Gray") if channels == 1 else ("RGB", "420")
        encoded = simplejpeg.encode_jpeg(pixels, options.quality, colour, sampling)
        return Encoded(bytes(encoded), "jpg", width, height, channels)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "png", width, height, channels)
