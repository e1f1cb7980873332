"""Views of labelled images: the published fine-tuning recipe, and the view that is tested on.

Training views are drawn by timm, batches are mixed by timm; this file only decides what its draws
follow: the global generators of Python, NumPy and torch are set from a key around each call and
put back afterwards. A sample is therefore a pure function of (seed, epoch, sample), whatever the
number of workers, and a mixed batch one of (seed, step, rank). The generators belong to the whole
process: make views in one thread of it at a time.

Source: microsoft/SimMIM:data/data_finetune.py and config.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmim.config.bounds import check_bounds
from simmim.config.finetune import AugmentConfig
from simmim.data.augment import crop_box, is_flipped, resized
from simmim.data.decode import MAX_PIXELS, decode
from simmim.data.mixing import draws_from
from simmim.data.timm_import import import_timm
from simmim_kernels.splitmix import fold, uniform

# Keeps the draws of views apart from other uses of the same (seed, epoch, sample).
VIEW_STREAM = 0x66747677  # "ftvw"

# Views up to this size are moved by up to PADDING pixels instead of cropped to a random scale.
SMALL, PADDING = 32, 4

# Before the short side is scaled, longer images lose their ends: 1 × 10^6 pixels would not fit.
MAX_ASPECT = 16

# Draws of `crop_box` and `is_flipped` take the counters below.
_FIRST_FREE_COUNTER = 64


@dataclass(frozen=True)
class Pixels:
    """The arrays that views make: float32 [C, H, W], (value / 255 - mean) / std.

    Attributes:
        size: (height, width), pixels.
        mean: per channel, on the 0-1 scale.
        std: per channel, on the 0-1 scale.
        max_pixels: larger images are refused.
        value_range: see `simmim.data.decode.decode`.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return (len(self.mean), *self.size)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """uint8 [H, W, C] of an encoded image; raises UnreadableImage."""
        return decode(
            data, len(self.mean), max_pixels=self.max_pixels, value_range=self.value_range
        )

    def normalise(self, image: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Write uint8 [H, W, C] to float32 [C, H, W], rounded as torchvision rounds."""
        values = np.arange(256, dtype=np.float32) / np.float32(255)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
            table = (values - np.float32(mean)) / np.float32(std)
            np.take(table, image[:, :, channel], out=out[channel], mode="clip")


class TrainingView:
    """Random views by the published recipe, through timm.

    Views of at most 32 pixels are shifted by up to 4 pixels instead of cropped to a random scale;
    an image of another size is scaled to cover the view first. A recipe of crop and flip alone does
    without timm, and so do other than 1 and 3 channels: its policies are made for grey and colour.

    Args:
        pixels: what the arrays hold.
        seed: of the run.
        augment: what is drawn; None is the published recipe.

    Attributes:
        note: a line on what the recipe leaves out for these images; "" where it is whole.

    Raises:
        ConfigError: a value of `augment` is out of its bounds.
        RunError: timm is missing, and the recipe needs it.
    """

    dtype = "float32"

    def __init__(self, pixels: Pixels, seed: int, augment: AugmentConfig | None = None) -> None:
        self.pixels, self.seed, self.augment = pixels, seed, augment or AugmentConfig()
        check_bounds(self.augment, "augment.")
        self.shape: tuple[int, ...] = pixels.shape
        channels = len(pixels.mean)
        self.note = ""
        self._transform: Any = None
        plain = not (self.augment.auto_augment or self.augment.color_jitter or self.augment.erase)
        if plain:
            return
        if channels in (1, 3):
            self._transform = _published(pixels, self.augment)
        else:
            self.note = (
                f"images of {channels} channels are cropped and flipped only: RandAugment, colour "
                "jitter and random erasing are made for 1 or 3"
            )

    def __call__(self, data: bytes, epoch: int, sample: int) -> NDArray[np.float32]:
        """The view as a new array, float32 [C, H, W]; raises UnreadableImage."""
        out = np.empty(self.shape, dtype=np.float32)
        self.fill(out, data, epoch, sample)
        return out

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `View`."""
        image = self.pixels.decode(data)
        key = fold(VIEW_STREAM, self.seed, epoch, sample)
        small = max(self.pixels.size) <= SMALL
        image = _covering(image, self.pixels.size) if small else self._enlarged(image)
        if self._transform is None:
            self.pixels.normalise((self._shifted if small else self._cropped)(image, key), out)
            return
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        with draws_from(key):
            out[...] = self._transform(picture).numpy()

    def _enlarged(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # timm's crops of an image of a few pixels hold no pixel at times, and are then black
        low, high = self.augment.crop_ratio
        least = image.shape[0] * image.shape[1] * self.augment.crop_scale[0] * min(low, 1 / high)
        times = math.ceil(least**-0.5)
        return image if times == 1 else image.repeat(times, axis=0).repeat(times, axis=1)

    def _cropped(self, image: NDArray[np.uint8], key: int) -> NDArray[np.uint8]:
        height, width, _ = image.shape
        box = crop_box(key, width, height, self.augment.crop_scale, self.augment.crop_ratio)
        flip = is_flipped(key, self.augment.flip)
        return resized(image, box, self.pixels.size, flip=flip, filter="bicubic")

    def _shifted(self, image: NDArray[np.uint8], key: int) -> NDArray[np.uint8]:
        padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        h, w = self.pixels.size
        top = int(uniform(key, _FIRST_FREE_COUNTER) * (padded.shape[0] - h + 1))
        left = int(uniform(key, _FIRST_FREE_COUNTER + 1) * (padded.shape[1] - w + 1))
        view = padded[top : top + h, left : left + w]
        return view[:, ::-1] if is_flipped(key, self.augment.flip) else view


class EvaluationView:
    """The view that is tested on: scale, bicubic, then a central crop; nothing is drawn.

    The values are those of torchvision's Resize, CenterCrop, ToTensor and Normalize with Pillow up
    to 12; Pillow 13 begins with the columns of some images, which rounds otherwise.

    Args:
        pixels: what the arrays hold.
        margin: the image is scaled to cover int(margin · size) before the crop; published is
            256/224. 1 crops no more than the aspect asks for; 0 squeezes the whole image into the
            view. None is 256/224, and 1 for views of at most 32 pixels.
    """

    dtype = "float32"

    def __init__(self, pixels: Pixels, margin: float | None = None) -> None:
        if margin is None:
            margin = 1.0 if max(pixels.size) <= SMALL else 256 / 224
        if margin != 0 and margin < 1:
            raise ValueError(f"margin={margin}: choose 1 or more, or 0 to squeeze the image")
        self.pixels, self.margin = pixels, margin
        self.shape: tuple[int, ...] = pixels.shape

    def __call__(self, data: bytes) -> NDArray[np.float32]:
        """The view as a new array, float32 [C, H, W]; raises UnreadableImage."""
        out = np.empty(self.shape, dtype=np.float32)
        self.fill(out, data)
        return out

    def fill(self, out: NDArray[Any], data: bytes, epoch: int = 0, sample: int = 0) -> None:
        """See `View`; the same in every epoch."""
        image = self.pixels.decode(data)
        h, w = self.pixels.size
        if self.margin == 0:
            height, width, _ = image.shape
            view = resized(image, (0, 0, width, height), (h, w), filter="bicubic")
        else:
            scaled = _covering(image, (int(self.margin * h), int(self.margin * w)))
            # half to even, as torchvision's CenterCrop
            top, left = round((scaled.shape[0] - h) / 2), round((scaled.shape[1] - w) / 2)
            view = scaled[top : top + h, left : left + w]
        self.pixels.normalise(view, out)


def _published(pixels: Pixels, augment: AugmentConfig) -> Any:
    transform = import_timm("timm.data").create_transform(
        input_size=pixels.size,
        is_training=True,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.flip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment or None,
        interpolation="bicubic",
        mean=tuple(pixels.mean),
        std=tuple(pixels.std),
        re_prob=augment.erase,
        re_mode=augment.erase_mode,
        re_count=augment.erase_count,
    )
    for operation in _operations(transform.transforms):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterized, operation.aug_fn)
    if max(pixels.size) <= SMALL:
        shift = import_timm("torchvision.transforms").RandomCrop(pixels.size, padding=PADDING)
        transform.transforms[0] = shift
    return transform


def _operations(transform: Any) -> Iterator[Any]:
    # the operations of timm's policies, which nest them in lists
    if isinstance(transform, list | tuple):
        for part in transform:
            yield from _operations(part)
    elif hasattr(transform, "aug_fn"):
        yield transform
    else:
        yield from _operations(getattr(transform, "ops", []))
        yield from _operations(getattr(transform, "policy", []))


def _posterized(posterize: Any, image: Image.Image, bits: int, **options: Any) -> Image.Image:
    # the policy draws 0 bits at times, which mean black and which newer versions of Pillow refuse
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _covering(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale an image, bicubic, until it just covers `size`; sizes as torchvision rounds them."""
    height, width, _ = image.shape
    longest = MAX_ASPECT * max(size) / min(size)
    h, w = min(height, int(longest * width)), min(width, int(longest * height))
    left, top = (width - w) // 2, (height - h) // 2
    if h * size[1] <= w * size[0]:
        wanted = (size[0], int(size[0] * w / h))
    else:
        wanted = (int(size[1] * h / w), size[1])
    if wanted == (height, width):
        return image
    return resized(image, (left, top, w, h), wanted, filter="bicubic")
