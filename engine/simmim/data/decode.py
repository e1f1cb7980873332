"""Encoded bytes → a PIL image of the wanted number of channels, upright, 8 bits a channel."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableImage(ValueError):
    """A file that is no complete image; the message says why."""


def decode(data: bytes, channels: int) -> Image.Image:
    """Decode an image of any mode: grey, palette, CMYK, 16 bits, with EXIF rotation.

    Args:
        data: an encoded image.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        UnreadableImage: empty, truncated, or no image at all.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF blocks and big images
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _convert(ImageOps.exif_transpose(image), MODES[channels])
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged data; the run must outlive it
        raise UnreadableImage(f"{error or type(error).__name__}") from None


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit values at 255
        values = np.asarray(image).astype(np.int64)
        scaled = np.clip(values >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(scaled)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
