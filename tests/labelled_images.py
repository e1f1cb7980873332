"""Images of every number of channels, for tests of fine-tuning views."""

import io
import pickle
import random
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.finetune_views import Pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = Pixels((64, 64), MEAN, STD)
GREY = Pixels((64, 64), (0.45,), (0.23,))
BANDS = Pixels((24, 40), (0.5,) * 5, (0.25,) * 5)
SMALL = Pixels((32, 32), MEAN, STD)


def peer(module: str) -> Any:
    """A module of timm or torchvision; skips where it is missing or does not fit torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except Exception as error:
        pytest.skip(f"{module} cannot be imported: {str(error).splitlines()[0]}")


def encoded(pixels: np.ndarray) -> bytes:
    """A file of uint8 [H, W, C]: PNG for 1 and 3 channels, else .npy."""
    file = io.BytesIO()
    if pixels.shape[2] in (1, 3):
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    else:
        np.save(file, pixels)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(height * width)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def seed_generators(key: int) -> None:
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    torch.manual_seed(key)


def states() -> tuple[Any, ...]:
    # "None" is where gauss() keeps the second of a pair of draws
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()


KINDS = {"colour": COLOUR, "grey": GREY, "small": SMALL, "bands": BANDS}


def image_for(pixels: Pixels) -> bytes:
    return encoded(noise(90, 70, len(pixels.mean)))


def normalised(image: np.ndarray, pixels: Pixels) -> np.ndarray:
    unit = np.moveaxis(image, -1, 0).astype(np.float32) / np.float32(255)
    mean = np.array(pixels.mean, dtype=np.float32)[:, None, None]
    std = np.array(pixels.std, dtype=np.float32)[:, None, None]
    return (unit - mean) / std


def scaled_rows_first(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to (width, height) as Pillow up to 12 does; later ones may begin with the columns."""
    bicubic = Image.Resampling.BICUBIC
    return image.resize((size[0], image.height), bicubic).resize(size, bicubic)
