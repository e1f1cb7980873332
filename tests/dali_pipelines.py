"""Pipelines of DALI with settings small enough for tests, and what the CPU path makes."""

import io

import numpy as np
import torch
from PIL import Image

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.decode import UnreadableImage, decode
from simmim.data.producer import Filled
from simmim.data.source import Source

AUGMENTATION = Augmentation((48, 64), (0.4, 1.0), (3 / 4, 4 / 3), 0.5, 3)
CPU = torch.device("cpu")
SEED = 5


def pipeline(source: Source, **options: object) -> DaliPipeline:
    settings: dict = {
        "device": CPU,
        "micro_batch": 8,
        "threads": 2,
        "prefetch": 2,
        "memory_bytes": 2**28,
    }
    augmentation = options.pop("augmentation", AUGMENTATION)
    assert isinstance(augmentation, Augmentation)
    return DaliPipeline(source, augmentation, SEED, **(settings | options))


def every(source: Source, size: int = 8) -> list[list[tuple[int, int]]]:
    """Each sample once, in epoch 3."""
    places = [(3, sample) for sample in range(len(source.names))]
    return [places[start : start + size] for start in range(0, len(places), size)]


def images(filled: list[Filled]) -> np.ndarray:
    return np.concatenate([batch.image.numpy() for batch in filled])


def by_cpu(source: Source, augmentation: Augmentation = AUGMENTATION) -> list[np.ndarray | None]:
    """The CPU path's views of epoch 3; None where it refuses the image."""
    views: list[np.ndarray | None] = []
    for sample in range(len(source.names)):
        try:
            image = decode(source.read(sample), augmentation.channels)
        except UnreadableImage:
            views.append(None)
            continue
        views.append(augment(image, sample_key(SEED, 3, sample), augmentation))
    return views


def encoded(picture: np.ndarray, file_format: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def picture(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    resized = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)
