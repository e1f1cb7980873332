"""The augmentation of the paper, as a pure function of a key: random crop, resize, flip.

Source: Xie et al. 2021, section 4.1; crop boxes as torchvision's RandomResizedCrop chooses them.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmim_kernels import crop_resize, native
from simmim_kernels.crop_resize import Filter
from simmim_kernels.splitmix import fold, fold_into, uniform

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
        channels: of the images.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    channels: int


def sample_key(seed: int, epoch: int, sample: int) -> int:
    """The key of one sample's augmentation."""
    return fold_into(_epoch_key(seed, epoch), sample)


@lru_cache(maxsize=4)
def _epoch_key(seed: int, epoch: int) -> int:
    return fold(STREAM, seed, epoch)


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


def is_flipped(key: int, probability: float) -> bool:
    """Whether a sample's view is mirrored."""
    return uniform(key, 4 * ATTEMPTS) < probability


def augment(
    image: NDArray[np.uint8],
    key: int,
    augmentation: Augmentation,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Crop, resize (bilinear, antialiased) and flip, a pure function of `key`.

    Args:
        image: uint8 [H, W, C].
        key: of `sample_key`.
        augmentation: what is drawn.
        out: uint8 [h, w, C] to write to, C-contiguous.

    Returns:
        uint8 [h, w, C]; `out` where it was given.
    """
    height, width, _ = image.shape
    box = crop_box(key, width, height, augmentation.scale, augmentation.ratio)
    flip = is_flipped(key, augmentation.flip)
    return resized(image, box, augmentation.size, flip=flip, out=out)


def centre_box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest central box (left, top, width, height) of the aspect of `size`."""
    factor = min(width / size[1], height / size[0])
    w, h = max(1, round(size[1] * factor)), max(1, round(size[0] * factor))
    return (width - w) // 2, (height - h) // 2, w, h


def centre_view(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The largest central crop of the wanted aspect, resized → uint8 [h, w, C]; for pictures."""
    height, width, _ = image.shape
    return resized(image, centre_box(width, height, size), size)


def resized(
    image: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    flip: bool = False,
    filter: Filter = "bilinear",
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """A box of an image, resized with antialiasing: Pillow's pixels, rows first, to the bit.

    Without the native kernels Pillow itself resizes; it is faster than the op's reference.

    Args:
        image: uint8 [H, W, C].
        box: (left, top, width, height), pixels.
        size: (h, w) of the result, pixels.
        flip: mirror left and right.
        filter: as Pillow names it, in lower case.
        out: uint8 [h, w, C] to write to, C-contiguous.

    Returns:
        uint8 [h, w, C]; `out` where it was given.
    """
    if native.extension is not None:
        return crop_resize(image, box, size, flip=flip, filter=filter, out=out)
    left, top, w, h = box
    resample = Image.Resampling[filter.upper()]
    # rows, then columns: Pillow 13 chooses their order by the size
    bands = [
        np.asarray(
            Image.fromarray(band).resize((size[1], h), resample).resize(size[::-1], resample)
        )
        for band in np.moveaxis(image[top : top + h, left : left + w], -1, 0).copy()
    ]
    pixels = np.stack(bands, axis=-1)
    pixels = pixels[:, ::-1] if flip else pixels
    if out is None:
        return np.ascontiguousarray(pixels)
    out[...] = pixels
    return out
