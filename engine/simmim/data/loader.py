"""Steps of batches on the device; counts what could not be read, times the wait."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from simmim.data.batch import Batch
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.producer import Filled, InlineProducer, Producer, SourceSamples
from simmim.data.source import Source
from simmim.data.views import View
from simmim.data.workers import WorkerPool
from simmim.distributed import World
from simmim.environment import Launch
from simmim.errors import DataError

# So many unreadable images in a row mean that the disk is gone, not that a file is broken.
MAX_UNREADABLE_IN_A_ROW = 1000


def default_workers(world: World) -> int:
    """Decoding processes when data.workers is -1: the cores shared among processes."""
    cores = Launch.of_environment().cores
    if world.device.type == "cuda":
        return max(1, min(cores - 1, 16))
    # on the CPU the model wants the cores; one worker hides the decoding behind the step
    return 1 if cores > 1 else 0


def _noted(
    positions: Iterable[list[tuple[int, int]]], asked: deque[list[tuple[int, int]]]
) -> Iterator[list[tuple[int, int]]]:
    """The same micro-batches, remembered in `asked` until their images come."""
    for places in positions:
        asked.append(places)
        yield places


class Loader:
    """Iterates over steps; each item is the list of micro-batches of one optimiser step.

    Args:
        source: images.
        view: makes the arrays.
        seed: the run's seed.
        micro_batch: images per process and backward pass.
        accumulation_steps: backward passes per step.
        workers: decoding processes; 0 decodes here; -1 chooses.
        prefetch: micro-batches held ready.
        world: this process.
        timeout_s: seconds after which a process that is still at one image is replaced.
        producer: what makes the images instead of `workers`, such as DALI.

    Attributes:
        wait_s: seconds spent waiting for data so far.
        waiting: whether it waits for data right now.
        problems: (sample, reason) of images that could not be read; whoever reports them clears it.
        report: told, in a line, of processes that had to be replaced.
        backend: what decodes, and why, in words.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        *,
        seed: int,
        micro_batch: int,
        accumulation_steps: int,
        workers: int,
        prefetch: int,
        world: World,
        timeout_s: float = 120,
        producer: Producer | None = None,
    ) -> None:
        self.source, self.world = source, world
        self.order = SampleOrder(len(source.names), seed)
        self.micro_batch, self.accumulation_steps = micro_batch, accumulation_steps
        self.workers = default_workers(world) if workers < 0 else workers
        self.kind_of_workers = "workers" if producer is None else "threads (DALI)"
        self.wait_s = 0.0
        self.waiting = False
        self.problems: list[tuple[int, str]] = []
        self.report: Callable[[str], None] = lambda line: None
        self.backend = "cpu"
        self._unreadable_in_a_row = 0
        samples = SourceSamples(source, view)
        on_cuda = world.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(world.device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        if producer is not None:
            self.producer = producer
        elif self.workers:
            self.producer = WorkerPool(
                samples,
                micro_batch,
                workers=self.workers,
                prefetch=prefetch,
                timeout_s=timeout_s,
                report=lambda line: self.report(line),
                pin=on_cuda,
            )
        else:
            self.producer = InlineProducer(samples)

    def remedy(self) -> str:
        """What to do when steps wait for data, in words."""
        spare = Launch.of_environment().cores
        if self.workers == 0 and spare > 1:
            return "the training process decodes by itself; try --data.workers=1"
        decoders = f"{self.workers} data {self.kind_of_workers} cannot keep up"
        if self.workers < spare - 1:
            return f"{decoders}; try --data.workers={spare - 1}"
        if getattr(self.source, "sizes", None) is not None:  # packed shards
            return f"{decoders} on as many cores; docs/feed-eight-gpus.md tells what each costs"
        return (
            f"{decoders} on as many cores; `simmim pack` stores the images small, which decodes "
            "several times as fast"
        )

    def steps(self, first: int, last: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of steps `first` … `last` - 1, on the device."""
        world = self.world
        positions = MicroBatches(
            self.order,
            self.micro_batch,
            self.accumulation_steps,
            world.rank,
            world.size,
            first,
            last,
        )
        # whatever ends the loop: processes must be gone before the interpreter waits for them
        asked: deque[list[tuple[int, int]]] = deque()
        with closing(self.producer.batches(_noted(positions, asked))) as filled:
            try:
                for _ in range(first, last):
                    yield [self._next(filled, asked) for _ in range(self.accumulation_steps)]
            finally:
                self.waiting = False

    def _next(
        self, filled: Generator[Filled, None, None], asked: deque[list[tuple[int, int]]]
    ) -> Batch:
        started = time.perf_counter()
        self.waiting = True
        if self._copied is not None:
            self._copied.synchronize()  # the producer writes that memory again from now on
        filled_batch = next(filled)
        self.waiting = False
        self.wait_s += time.perf_counter() - started
        places = asked.popleft()
        empty = [slot for slot, _ in filled_batch.problems]
        self._note_problems(
            [(places[slot][1], reason) for slot, reason in filled_batch.problems], places
        )
        both = torch.tensor(places)  # [B, 2]: epoch, sample
        both[empty, 1] = -1
        image, both = self._to_device(filled_batch.image, both)
        return Batch(image, both[:, 1], both[:, 0], len(places) - len(empty))

    def _to_device(self, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        device = self.world.device
        if self._stream is None:
            # the producer goes on to write where `image` lies
            return image.clone(), places
        if image.is_cuda:
            return image, places.to(device, non_blocking=True)
        # beside the step that runs, which the host has merely queued; not run on a GPU
        here = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._stream):
            moved = image.to(device, non_blocking=True)
            numbers = places.to(device, non_blocking=True)
            self._copied = self._stream.record_event()
        here.wait_stream(self._stream)
        moved.record_stream(here)
        numbers.record_stream(here)
        return moved, numbers

    def _note_problems(
        self, problems: list[tuple[int, str]], places: list[tuple[int, int]]
    ) -> None:
        self.problems += problems
        if len(problems) < len(places):
            self._unreadable_in_a_row = 0
            return
        self._unreadable_in_a_row += len(problems)
        limit = min(len(self.source.names), MAX_UNREADABLE_IN_A_ROW)
        if self._unreadable_in_a_row >= limit:
            name = self.source.names[problems[0][0]]
            raise DataError(
                f"the last {self._unreadable_in_a_row} images could all not be read "
                f"({name}: {problems[0][1]}); is the disk still there?"
            )
