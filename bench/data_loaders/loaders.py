"""The data loaders that bench/data.py compares: the engine's and those of other packages.

Each loader is built in the way of its own users for SimMIM pre-training: random crops
(RandomResizedCrop with scale 0.67 to 1, bilinear, antialiased), horizontal flips, batches. Each
has one process or thread that decodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Job:
    """What a row loads.

    Attributes:
        folder: image files in one class folder, for loaders that read folders.
        shards: tar files of the same images, for loaders that read shards.
        source: the value of `--data.path` for `simmim pretrain`.
        size: side of the crops in pixels.
        batch: images per batch.
    """

    folder: Path
    shards: list[Path]
    source: Path
    size: int
    batch: int


# Yields the number of images of each batch, without end.
Batches = Iterator[int]


def simmim(job: Job) -> Batches:
    """`data.workers=1`: uint8 batches, which the model normalises by itself."""
    import torch

    from simmim.data.augment import Augmentation
    from simmim.data.loader import Loader
    from simmim.data.open import open_source
    from simmim.data.views import CroppedView
    from simmim.distributed import World

    loader = Loader(
        open_source(str(job.source)),
        CroppedView(Augmentation((job.size, job.size), SCALE, RATIO, 0.5, 3), 0),
        seed=0,
        micro_batch=job.batch,
        accumulation_steps=1,
        workers=1,
        prefetch=4,
        world=World(0, 1, torch.device("cpu")),
    )
    for (batch,) in loader.steps(0, 10**9):
        yield batch.num_valid


def decode_only(job: Job) -> Batches:
    """Not a loader: libjpeg-turbo through simplejpeg, one image after another. A floor."""
    import simplejpeg

    from simmim.data.open import open_source

    source = open_source(str(job.source))
    data = [source.read(index) for index in range(len(source.names))]
    while True:
        for encoded in data:
            simplejpeg.decode_jpeg(encoded, "RGB")
            yield 1


def _torchvision_transform(job: Job, *, normalise: bool) -> Any:
    from torchvision import transforms as T

    steps: list[Any] = [
        T.RandomResizedCrop(job.size, scale=SCALE, ratio=RATIO),
        T.RandomHorizontalFlip(),
    ]
    steps += [T.ToTensor(), T.Normalize(MEAN, STD)] if normalise else [T.PILToTensor()]
    return T.Compose(steps)


def _torchvision_loader(job: Job, *, normalise: bool) -> Batches:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    transform = _torchvision_transform(job, normalise=normalise)
    dataset = ImageFolder(str(job.folder.parent), transform)
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    for images, _ in DataLoader(dataset, job.batch, sampler=sampler, num_workers=1):
        yield len(images)


def torchvision(job: Job) -> Batches:
    """ImageFolder and DataLoader with the transforms of microsoft/SimMIM."""
    return _torchvision_loader(job, normalise=True)


def torchvision_uint8(job: Job) -> Batches:
    """The same without ToTensor and Normalize, which are part of the model in this project."""
    return _torchvision_loader(job, normalise=False)


def timm(job: Job) -> Batches:
    """`timm.data.create_loader` with its prefetcher, which collates uint8 and normalises later."""
    import torch
    from timm.data import create_dataset, create_loader

    # timm's sampler ends with the epoch, so the dataset is repeated
    dataset = create_dataset("", str(job.folder.parent), class_map="")
    repeated = torch.utils.data.ConcatDataset([dataset] * 100)
    repeated.transform = None
    loader = create_loader(
        repeated,
        (3, job.size, job.size),
        job.batch,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=0,
        interpolation="bilinear",
        num_workers=1,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    dataset.transform = repeated.transform  # create_loader set it on the repeated dataset
    for images, _ in loader:
        yield len(images)


def dali(job: Job, device: str = "cpu") -> Batches:
    """DALI's file reader, decoder of random crops, resize and flip, in one thread.

    With device "mixed" the decoder, the resize and the flip run on the GPU.
    """
    from nvidia.dali import fn, pipeline_def, types

    placement = "gpu" if device == "mixed" else "cpu"

    @pipeline_def(batch_size=job.batch, num_threads=1, device_id=0 if device == "mixed" else None)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(
            file_root=str(job.folder.parent), random_shuffle=True, name="reader"
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device=device,
            output_type=types.RGB,
            random_area=list(SCALE),
            random_aspect_ratio=list(RATIO),
        )
        images = fn.resize(images, device=placement, size=[job.size, job.size], antialias=True)
        return fn.flip(images, device=placement, horizontal=fn.random.coin_flip())

    running = pipeline()
    running.build()
    while True:
        (images,) = running.run()
        yield len(images)


def dali_mixed(job: Job) -> Batches:
    """The same, decoded on the GPU."""
    return dali(job, "mixed")


def webdataset(job: Job) -> Batches:
    """WebDataset over tar shards, Pillow decoding, torchvision transforms, WebLoader."""
    import webdataset as wds

    transform = _torchvision_transform(job, normalise=True)
    dataset = (
        wds.WebDataset([str(shard) for shard in job.shards], resampled=True, shardshuffle=False)
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg;jpeg")
        .map_tuple(transform)
        .batched(job.batch)
    )
    for (images,) in wds.WebLoader(dataset, batch_size=None, num_workers=1):
        yield len(images)


LOADERS: dict[str, Callable[[Job], Batches]] = {
    "simmim": simmim,
    "torchvision": torchvision,
    "torchvision-uint8": torchvision_uint8,
    "timm": timm,
    "dali-cpu": dali,
    "webdataset": webdataset,
    "decode-only": decode_only,
}
ON_CUDA: dict[str, Callable[[Job], Batches]] = {"dali-mixed": dali_mixed}
# Modules that must import before a row can run.
NEEDS = {
    "torchvision": ("torchvision",),
    "torchvision-uint8": ("torchvision",),
    "timm": ("timm",),
    "dali-cpu": ("nvidia.dali",),
    "dali-mixed": ("nvidia.dali",),
    "webdataset": ("webdataset", "torchvision"),
}
