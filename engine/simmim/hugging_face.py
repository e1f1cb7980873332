"""A collator for Hugging Face's Trainer: our views and masks under the names that its models take.

B batch, C channels, H W pixels, L patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.decode import MODES, decode
from simmim.environment import Launch
from simmim.model.image_model import IMAGENET_MEAN, IMAGENET_STD
from simmim_kernels import random_patch_mask
from simmim_kernels.masked_l1_loss.reference import normalise_pixels
from simmim_kernels.splitmix import fold


@dataclass
class MaskCollator:
    """Makes a batch for masked image modelling from a list of examples.

    An example is a dict. It holds "pixel_values", a float array or tensor [C, H, W] that is ready
    for the model, or "image", which is cropped, resized, flipped and normalised here: a Pillow
    image, a uint8 array [H, W, C], the bytes of a file, or what `datasets` gives where it does not
    decode, {"bytes": …, "path": …}.

    Where the examples have an "id" (their number in the dataset), crops and masks are a pure
    function of (seed, epoch, id): the same after a resume, and with any number of workers or
    processes. Without it they follow from torch's generator, which Trainer seeds.

    Attributes:
        image_size: side of the model's images, or (height, width), in pixels.
        patch_size: side of the model's patches, in pixels: `config.patch_size`.
        mask_unit: side of a mask unit, in pixels; a multiple of patch_size that divides the image.
        mask_ratio: share of the units that is hidden, rounded up to whole units.
        seed: seed of crops, flips and masks.
        crop_scale: smallest and largest share of the area that a random crop covers.
        crop_ratio: smallest and largest width/height of a random crop.
        flip: probability of a horizontal flip.
        mean: per channel on the 0–1 scale; its length is the number of channels.
        std: per channel on the 0–1 scale.
        epoch: the pass over the data that ids belong to; see `set_epoch`.

    Raises:
        ValueError: the mask units tile neither the image nor whole patches, or mean and std differ
            in length.
    """

    image_size: int | tuple[int, int] = 192
    patch_size: int = 4
    mask_unit: int = 32
    mask_ratio: float = 0.6
    seed: int = 0
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    epoch: int = 0

    def __post_init__(self) -> None:
        side = self.image_size
        self.size = (side, side) if isinstance(side, int) else (side[0], side[1])
        unit, patch = self.mask_unit, self.patch_size
        if unit < 1 or patch < 1 or unit % patch or any(side % unit for side in self.size):
            raise ValueError(
                f"mask_unit={unit} px must be a multiple of patch_size={patch} px and divide "
                f"images of {self.size[0]}×{self.size[1]} px"
            )
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}")

    def set_epoch(self, epoch: int) -> None:
        """Set which pass over the data begins; workers of a DataLoader read it when they start."""
        self.epoch = epoch

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make the batch of a list of examples.

        Returns:
            "pixel_values", float32 [B, C, H, W], and "bool_masked_pos", bool [B, L], True marks a
            hidden patch.

        Raises:
            ValueError: an example has neither image nor pixel values, or pixel values of another
                size; encoded bytes that are no image raise UnreadableImage, which is a ValueError.
        """
        epoch, ids = self._places(examples)
        if "pixel_values" in examples[0]:
            pixels = self._stacked([example["pixel_values"] for example in examples])
        elif "image" in examples[0]:
            pixels = self._cropped([example["image"] for example in examples], epoch, ids)
        else:
            raise ValueError(
                f"examples have {', '.join(examples[0])}, but neither image nor pixel_values; "
                "with Trainer, set remove_unused_columns=False"
            )
        mask = random_patch_mask(
            len(ids),
            (self.size[0] // self.patch_size, self.size[1] // self.patch_size),
            ratio=self.mask_ratio,
            unit=self.mask_unit // self.patch_size,
            seed=self.seed,
            ids=ids,
            epoch=epoch,
        )
        return {"pixel_values": pixels, "bool_masked_pos": mask.flatten(1)}

    def _places(self, examples: Sequence[Mapping[str, Any]]) -> tuple[int, list[int]]:
        """The epoch and the ids from which every draw of the batch follows."""
        if all("id" in example for example in examples):
            return self.epoch, [int(example["id"]) for example in examples]
        # one draw per batch replaces the epoch; with the rank, as processes have equal generators
        drawn = fold(int(torch.randint(2**62, ())), Launch.of_environment().rank)
        return drawn >> 1, list(range(len(examples)))

    def _stacked(self, values: Sequence[Any]) -> Tensor:
        pixels = torch.stack([torch.as_tensor(value) for value in values]).float()
        if pixels.shape[1:] != (len(self.mean), *self.size):
            raise ValueError(
                f"pixel_values are {list(pixels.shape[1:])}, the collator expects "
                f"{[len(self.mean), *self.size]}: set its image_size and mean to the model's"
            )
        return pixels

    def _cropped(self, images: Sequence[Any], epoch: int, ids: Sequence[int]) -> Tensor:
        channels = len(self.mean)
        drawn = Augmentation(self.size, self.crop_scale, self.crop_ratio, self.flip, channels)
        out = np.empty((len(images), *self.size, channels), np.uint8)
        for slot, (image, sample) in enumerate(zip(images, ids)):
            key = sample_key(self.seed, epoch, sample)
            augment(_pixels(image, channels), key, drawn, out[slot])
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return normalise_pixels(torch.from_numpy(out).permute(0, 3, 1, 2), mean, std).contiguous()


def _pixels(image: Any, channels: int) -> NDArray[np.uint8]:
    """uint8 [H, W, C] from any form that an image of an example may have."""
    if isinstance(image, Mapping):
        image = image["bytes"] or Path(image["path"]).read_bytes()
    if isinstance(image, bytes):
        return decode(image, channels)
    if isinstance(image, Image.Image):
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(MODES.get(channels)))
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
        raise ValueError(
            f"an image is {type(image).__name__} of {pixels.dtype} {list(pixels.shape)}; expected "
            f"a Pillow image, the bytes of a file, or a uint8 array [H, W, {channels}]"
        )
    return np.ascontiguousarray(pixels)
