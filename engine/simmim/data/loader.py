"""Decodes and augments in worker processes, skips what cannot be read, and times the wait."""

import errno
import os
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.decode import UnreadableImage, decode
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.source import DataError, Source
from simmim.distributed import World

# So many unreadable images in a row mean that the disk is gone, not that a file is broken.
MAX_UNREADABLE_IN_A_ROW = 1000

# The machine is out of descriptors or memory: no reason to call an image broken.
NOT_THE_IMAGES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# How long a worker goes on after a first SIGTERM.
GRACE_S = 120


@dataclass(frozen=True)
class Batch:
    """Images of one backward pass, on the device.

    Attributes:
        image: uint8 [B, H, W, C]; zeros in empty slots.
        ids: int64 [B]; -1 in empty slots (unreadable images).
        epochs: int64 [B].
        num_valid: slots that hold an image; known on the host.
    """

    image: Tensor
    ids: Tensor
    epochs: Tensor
    num_valid: int


@dataclass(frozen=True)
class Sample:
    """One slot of a batch: the pixels, or why there are none."""

    sample: int
    epoch: int
    pixels: np.ndarray | None
    problem: str = ""


@dataclass(frozen=True)
class HostBatch:
    """A micro-batch on the host; `problems` lists (sample, reason) of the empty slots."""

    image: Tensor
    ids: Tensor
    epochs: Tensor
    problems: list[tuple[int, str]]

    def pin_memory(self) -> "HostBatch":
        """The same in page-locked memory (called by DataLoader)."""
        return HostBatch(
            self.image.pin_memory(), self.ids.pin_memory(), self.epochs.pin_memory(), self.problems
        )


class AugmentedImages(Dataset[Sample]):
    """Map of (epoch, sample) to an augmented image; every draw is keyed, nothing is remembered."""

    def __init__(self, source: Source, augmentation: Augmentation, seed: int) -> None:
        self.source, self.augmentation, self.seed = source, augmentation, seed

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, sample = place
        try:
            image = decode(self.source.read(sample), self.augmentation.channels)
        except (UnreadableImage, OSError) as error:
            if isinstance(error, OSError) and error.errno in NOT_THE_IMAGES_FAULT:
                raise
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return Sample(sample, epoch, None, reason)
        key = sample_key(self.seed, epoch, sample)
        return Sample(sample, epoch, augment(image, key, self.augmentation))

    def collate(self, samples: list[Sample]) -> HostBatch:
        """Stack samples; an unreadable one leaves a slot of zeros with id -1."""
        shape = (len(samples), *self.augmentation.size, self.augmentation.channels)
        pixels = np.zeros(shape, dtype=np.uint8)
        for slot, sample in enumerate(samples):
            if sample.pixels is not None:
                pixels[slot] = sample.pixels
        ids = [-1 if s.pixels is None else s.sample for s in samples]
        return HostBatch(
            torch.from_numpy(pixels),
            torch.tensor(ids),
            torch.tensor([s.epoch for s in samples]),
            [(s.sample, s.problem) for s in samples if s.pixels is None],
        )


def default_workers(world: World) -> int:
    """Decoding processes when data.workers is -1: the cores shared among processes."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) // local_processes
    if world.device.type == "cuda":
        return max(1, min(cores - 1, 16))
    # on the CPU the model wants the cores; one worker hides the decoding behind the step
    return 1 if cores > 1 else 0


def _silent_where_nobody_listens(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # A signal may stop the main process half-way through receiving a batch. The thread that hands
    # out the batch's memory then meets a closed connection, which is no error to show.
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _prepare_worker(worker: int) -> None:
    sys.excepthook = _silent_where_nobody_listens
    _outlive_the_first_signal()


def _outlive_the_first_signal() -> None:
    # Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; the main process needs its
    # workers until it has saved. It ends them itself, with a second SIGTERM if need be.
    def end_on_the_second(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(GRACE_S)  # and never outlive a main process that hangs

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_on_the_second)


class Loader:
    """Iterates over steps; each item is the list of micro-batches of one optimiser step.

    Args:
        source: images.
        augmentation: what is drawn per sample.
        seed: the run's seed.
        micro_batch: images per process and backward pass.
        accumulation_steps: backward passes per step.
        workers: decoding processes; 0 decodes here; -1 chooses.
        prefetch: batches ready per worker.
        world: this process.

    Attributes:
        wait_s: seconds spent waiting for data so far.
        waiting: whether it waits for data right now.
        problems: (sample, reason) of images that could not be read; whoever reports them clears it.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        *,
        seed: int,
        micro_batch: int,
        accumulation_steps: int,
        workers: int,
        prefetch: int,
        world: World,
    ) -> None:
        self.source, self.world = source, world
        self.dataset = AugmentedImages(source, augmentation, seed)
        self.order = SampleOrder(len(source.names), seed)
        self.micro_batch, self.accumulation_steps = micro_batch, accumulation_steps
        self.workers = default_workers(world) if workers < 0 else workers
        self.prefetch = prefetch
        self.wait_s = 0.0
        self.waiting = False
        self.problems: list[tuple[int, str]] = []
        self._unreadable_in_a_row = 0

    def steps(self, first: int, last: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of steps `first` … `last` - 1, on the device."""
        positions = MicroBatches(
            self.order,
            self.micro_batch,
            self.accumulation_steps,
            self.world.rank,
            self.world.size,
            first,
            last,
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=positions,
            num_workers=self.workers,
            collate_fn=self.dataset.collate,
            prefetch_factor=self.prefetch if self.workers else None,
            worker_init_fn=_prepare_worker,
            pin_memory=self.world.device.type == "cuda",
            # its generator would otherwise draw from torch's global one
            generator=torch.Generator().manual_seed(0),
        )
        host_batches = iter(loader)
        try:
            for _ in range(first, last):
                started = time.perf_counter()
                self.waiting = True
                fetched = [next(host_batches) for _ in range(self.accumulation_steps)]
                self.waiting = False
                self.wait_s += time.perf_counter() - started
                yield [self._to_device(cast(HostBatch, batch)) for batch in fetched]
        finally:
            # whatever ends the loop: workers must be gone before the interpreter waits for them,
            # and one that hangs in a read does not end when asked
            self.waiting = False
            getattr(host_batches, "_shutdown_workers", bool)()
            for worker in getattr(host_batches, "_workers", ()):
                if worker.is_alive():
                    worker.kill()

    def _to_device(self, batch: HostBatch) -> Batch:
        self._note_problems(batch)
        device = self.world.device
        return Batch(
            batch.image.to(device, non_blocking=True),
            batch.ids.to(device, non_blocking=True),
            batch.epochs.to(device, non_blocking=True),
            len(batch.ids) - len(batch.problems),
        )

    def _note_problems(self, batch: HostBatch) -> None:
        self.problems += batch.problems
        if len(batch.problems) < len(batch.ids):
            self._unreadable_in_a_row = 0
            return
        self._unreadable_in_a_row += len(batch.problems)
        limit = min(len(self.source.names), MAX_UNREADABLE_IN_A_ROW)
        if self._unreadable_in_a_row >= limit:
            name = self.source.names[batch.problems[0][0]]
            raise DataError(
                f"the last {self._unreadable_in_a_row} images could all not be read "
                f"({name}: {batch.problems[0][1]}); is the disk still there?"
            )
