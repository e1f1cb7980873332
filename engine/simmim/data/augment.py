"""The augmentation of the paper, as a pure function of a key: random crop, resize, flip.

Source: Xie et al. 2021, section 4.1; crop boxes as torchvision's RandomResizedCrop chooses them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmim_kernels.splitmix import fold, uniform

# Keeps the augmentation's draws apart from those of other uses of the same (seed, epoch, sample).
STREAM = 0x63726F70  # "crop"

ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for every sample.

    Attributes:
        size: (height, width) of the output, in pixels.
        scale: smallest and largest share of the area that a crop covers.
        ratio: smallest and largest width/height of a crop.
        flip: probability of a horizontal flip.
        channels: 1, 3 or 4.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    channels: int


def sample_key(seed: int, epoch: int, sample: int) -> int:
    """The key of one sample's augmentation."""
    return fold(STREAM, seed, epoch, sample)


def crop_box(
    key: int, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random crop (left, top, width, height) of an image, in whole pixels.

    Ten attempts at a box of random area and aspect; if none fits, the largest central box whose
    aspect is within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(ATTEMPTS):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * uniform(key, 4 * attempt))
        aspect = math.exp(low + (high - low) * uniform(key, 4 * attempt + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(uniform(key, 4 * attempt + 2) * (width - w + 1))
            top = int(uniform(key, 4 * attempt + 3) * (height - h + 1))
            return left, top, w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (width - w) // 2, (height - h) // 2, w, h


def augment(image: Image.Image, key: int, augmentation: Augmentation) -> NDArray[np.uint8]:
    """Crop, resize (bilinear, antialiased) and flip → uint8 [H, W, C], a pure function of `key`."""
    left, top, w, h = crop_box(key, *image.size, augmentation.scale, augmentation.ratio)
    view = _resized(image.crop((left, top, left + w, top + h)), augmentation.size)
    if uniform(key, 4 * ATTEMPTS) < augmentation.flip:
        view = view[:, ::-1]
    return np.ascontiguousarray(view)


def centre_view(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The largest central crop of the wanted aspect, resized → uint8 [H, W, C]; for pictures."""
    height, width = size
    factor = min(image.width / width, image.height / height)
    w, h = max(1, round(width * factor)), max(1, round(height * factor))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return _resized(image.crop((left, top, left + w, top + h)), size)


def _resized(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.array(resized)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
