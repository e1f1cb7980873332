"""The loaders that bench/data.py compares: this project's and those of other packages.

Each is built as its own users would build it for SimMIM pre-training: RandomResizedCrop(size,
scale .67 to 1, bilinear, antialiased), horizontal flip, batches; one decoding process or thread.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Job:
    """What a row is to load.

    Attributes:
        folder: image files in one class folder, for loaders of folders.
        shards: tar files of the same images, for loaders of shards.
        source: what `simmim pretrain --data.path` would get.
        size: side of the crops, pixels.
        batch: images of a batch.
    """

    folder: Path
    shards: list[Path]
    source: Path
    size: int
    batch: int


# A loader without end: yields how many images each batch held.
Endless = Iterator[int]


def simmim(job: Job) -> Endless:
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


def decode_only(job: Job) -> Endless:
    """No loader: libjpeg-turbo through simplejpeg, one image after another. A floor."""
    import simplejpeg

    from simmim.data.open import open_source

    source = open_source(str(job.source))
    data = [source.read(index) for index in range(len(source.names))]
    while True:
        for encoded in data:
            simplejpeg.decode_jpeg(encoded, "RGB")
            yield 1


def _torchvision_dataset(job: Job, *, normalise: bool) -> Any:
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    steps: list[Any] = [
        T.RandomResizedCrop(job.size, scale=SCALE, ratio=RATIO),
        T.RandomHorizontalFlip(),
    ]
    steps += [T.ToTensor(), T.Normalize(MEAN, STD)] if normalise else [T.PILToTensor()]
    return ImageFolder(str(job.folder.parent), T.Compose(steps))


def _torch_loader(dataset: Any, job: Job) -> Endless:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    for images, _ in DataLoader(dataset, job.batch, sampler=sampler, num_workers=1):
        yield len(images)


def torchvision(job: Job) -> Endless:
    """ImageFolder and DataLoader with the transforms of microsoft/SimMIM."""
    return _torch_loader(_torchvision_dataset(job, normalise=True), job)


def torchvision_uint8(job: Job) -> Endless:
    """The same without ToTensor and Normalize, which here belong to the model."""
    return _torch_loader(_torchvision_dataset(job, normalise=False), job)


def timm(job: Job) -> Endless:
    """`timm.data.create_loader` with its prefetcher, which collates uint8 and normalises later."""
    import torch
    from timm.data import create_dataset, create_loader

    # timm's sampler ends with the epoch; its own option repeats the dataset instead
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
    dataset.transform = repeated.transform  # create_loader gave it to what it was handed
    for images, _ in loader:
        yield len(images)


def dali(job: Job, device: str = "cpu") -> Endless:
    """DALI's file reader, fused random-crop decoder, resize and flip; one thread.

    On "mixed" the decoder, the resize and the flip run on the GPU.
    """
    from nvidia.dali import fn, pipeline_def, types

    placed = "gpu" if device == "mixed" else "cpu"

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
        images = fn.resize(images, device=placed, size=[job.size, job.size], antialias=True)
        return fn.flip(images, device=placed, horizontal=fn.random.coin_flip())

    running = pipeline()
    running.build()
    while True:
        (images,) = running.run()
        yield len(images)


def dali_mixed(job: Job) -> Endless:
    """The same with GPU decoding."""
    return dali(job, "mixed")


def webdataset(job: Job) -> Endless:
    """WebDataset over tar shards, Pillow decoding, torchvision transforms, WebLoader."""
    import webdataset as wds
    from torchvision import transforms as T

    transform = T.Compose(
        [
            T.RandomResizedCrop(job.size, scale=SCALE, ratio=RATIO),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
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


LOADERS: dict[str, Callable[[Job], Endless]] = {
    "simmim": simmim,
    "torchvision": torchvision,
    "torchvision-uint8": torchvision_uint8,
    "timm": timm,
    "dali-cpu": dali,
    "webdataset": webdataset,
    "decode-only": decode_only,
}
ON_CUDA: dict[str, Callable[[Job], Endless]] = {"dali-mixed": dali_mixed}
NEEDS = {
    "torchvision": ("torchvision",),
    "torchvision-uint8": ("torchvision",),
    "timm": ("timm",),
    "dali-cpu": ("nvidia.dali",),
    "dali-mixed": ("nvidia.dali",),
    "webdataset": ("webdataset", "torchvision"),
}
