"""Micro-batches on their way through DALI, in order and within its memory.

A micro-batch is read ahead, cut into sub-batches that fit DALI's memory, and finished with what the
CPU path made. A sub-batch that fails in DALI is made by the CPU path too.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable

import numpy as np
import torch
from torch import Tensor

from simmim.data.dali.decoder import FAILURES, Decoder, reason_of
from simmim.data.dali.memory import SCHEDULED
from simmim.data.dali.readers import Read, Readers
from simmim.data.dali.samples import Preparation, PreparedSample
from simmim.data.producer import Filled
from simmim.errors import DataError

# Batches in a row that fail without naming an image: the machine is at fault.
MAX_FAILURES = 3


class MicroBatch:
    """A micro-batch on its way: it is read, DALI makes it in sub-batches, and it is finished."""

    def __init__(self, reads: list[Read[PreparedSample]]) -> None:
        self.reads = reads
        self.samples: list[PreparedSample] | None = None  # once all are read
        self.waiting: deque[list[int]] = deque()  # slots of sub-batches that DALI has not yet
        self.unfinished = 0  # sub-batches
        self.image: Tensor | None = None

    def begin(self, samples: list[PreparedSample], decoder: Decoder, sub_batch_pixels: int) -> None:
        """Cut what is DALI's into sub-batches within the memory budget."""
        self.samples, self.reads = samples, []
        shape = (len(samples), *decoder.augmentation.size, decoder.augmentation.channels)
        self.image = torch.empty(shape, dtype=torch.uint8, device=decoder.device)
        pixels = encoded = 0
        for slot, sample in enumerate(samples):
            if not sample.data:
                continue
            pixels, encoded = pixels + sample.pixels, encoded + len(sample.data)
            if not self.waiting or max(pixels, encoded) > sub_batch_pixels:
                self.waiting.append([])
                pixels, encoded = sample.pixels, len(sample.data)
            self.waiting[-1].append(slot)
        self.unfinished = len(self.waiting)

    def finish(self) -> Filled:
        """The batch with what DALI has not made: our own views, and zeros."""
        assert self.samples is not None
        assert self.image is not None
        made_here = [slot for slot, sample in enumerate(self.samples) if not sample.data]
        if made_here:
            empty = np.zeros(self.image.shape[1:], np.uint8)
            views = [self.samples[slot].view for slot in made_here]
            stacked = torch.from_numpy(np.stack([empty if v is None else v for v in views]))
            slots = torch.tensor(made_here, device=self.image.device)
            self.image[slots] = stacked.to(self.image.device)
        problems = [(slot, s.problem) for slot, s in enumerate(self.samples) if s.problem]
        return Filled(self.image, problems)


class Pass:
    """One pass over micro-batches.

    Args:
        preparation: reads the samples, and makes those that DALI cannot.
        readers: the threads in which it does so.
        decoder: DALI.
        sub_batch_pixels: of whole images that DALI is given at a time.
        prefetch: micro-batches that are read ahead of the one asked for.
        timeout_s: after which a read that gives no answer is given up.
        report: told, in a line, what DALI could not do.
    """

    def __init__(
        self,
        preparation: Preparation,
        readers: Readers[PreparedSample],
        decoder: Decoder,
        *,
        sub_batch_pixels: int,
        prefetch: int,
        timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        self.preparation, self.readers, self.decoder = preparation, readers, decoder
        self.sub_batch_pixels, self.prefetch = sub_batch_pixels, prefetch
        self.timeout_s, self.report = timeout_s, report
        self.begun: deque[MicroBatch] = deque()
        self.scheduled: deque[tuple[MicroBatch, list[int]]] = deque()
        self.failures = 0

    def run(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """Micro-batches in order, `prefetch` of them ahead."""
        coming = iter(places)
        prepare = self.preparation.prepare
        while True:
            while len(self.begun) < self.prefetch + 1 and (batch := next(coming, None)) is not None:
                reads = [self.readers.submit(prepare, *place) for place in batch]
                self.begun.append(MicroBatch(reads))
            if not self.begun:
                return
            batch_now = self.begun[0]
            if batch_now.samples is None:
                self._begin(batch_now, [self._answer(read) for read in batch_now.reads])
            self._schedule()
            while batch_now.unfinished:
                self._collect()
                self._schedule()
            self.begun.popleft()
            yield batch_now.finish()

    def _begin(self, batch: MicroBatch, samples: list[PreparedSample]) -> None:
        batch.begin(samples, self.decoder, self.sub_batch_pixels)

    def _answer(self, read: Read[PreparedSample]) -> PreparedSample:
        while True:
            try:
                return read.future.result(timeout=self.timeout_s / 4)
            except TimeoutError:
                if read.future.done():  # just now, or with a TimeoutError of the source
                    return read.future.result()
                silent_s = time.monotonic() - (read.since or math.inf)
                if silent_s > self.timeout_s:
                    epoch, sample = read.arguments[:2]
                    self.readers.hire()
                    self.report(
                        f"a read gave no answer for {silent_s:.0f} s at "
                        f"{self.preparation.source.names[sample]}; given up"
                    )
                    return PreparedSample(epoch, sample, problem=f"no answer for {silent_s:.0f} s")

    def _schedule(self) -> None:
        """Give DALI what has been read, in order, as far as it may look ahead."""
        for batch in self.begun:
            if batch.samples is None:
                if not all(read.is_answered() for read in batch.reads):
                    return  # or one has failed, which is raised when the turn of its batch has come
                self._begin(batch, [read.future.result() for read in batch.reads])
            assert batch.samples is not None
            while batch.waiting:
                if len(self.scheduled) >= SCHEDULED:
                    return
                slots = batch.waiting[0]
                try:
                    self.decoder.schedule([batch.samples[slot] for slot in slots])
                except FAILURES as error:
                    if not self.scheduled:
                        batch.waiting.popleft()
                        self._make_here(batch, slots, error)
                    return  # otherwise the oldest in work fails as well, and its turn comes first
                batch.waiting.popleft()
                self.scheduled.append((batch, slots))

    def _collect(self) -> None:
        if not self.scheduled:
            return
        batch, slots = self.scheduled.popleft()
        assert batch.image is not None
        try:
            self.decoder.collect(batch.image, slots)
        except FAILURES as error:
            self._make_here(batch, slots, error)
            return
        batch.unfinished -= 1
        self.failures = 0

    def _make_here(self, batch: MicroBatch, slots: list[int], error: Exception) -> None:
        """Make a sub-batch that failed by the CPU path; DALI starts anew with the others."""
        assert batch.samples is not None
        for other, others in reversed(self.scheduled):
            other.waiting.appendleft(others)
        self.scheduled.clear()
        samples, preparation = batch.samples, self.preparation
        reason = reason_of(error)
        named = re.search(r"sample #(\d+)", reason)
        if named:
            offender = samples[slots[int(named[1])]].sample
            preparation.made_here.add(offender)
            name = preparation.source.names[offender]
            self.report(
                f"DALI cannot decode {name} ({reason}); its batch was decoded here, and it will be"
            )
        else:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                raise DataError(
                    f"DALI fails on batch after batch ({reason}); try fewer data.dali_memory_mib, "
                    "or data.backend=cpu; the same command resumes from the last checkpoint"
                )
            self.report(f"DALI failed on a batch ({reason}); it was decoded here")
        self.decoder.rebuild()
        redone = [
            self.readers.submit(preparation.make_here, s.epoch, s.sample, s.data)
            for s in (samples[slot] for slot in slots)
        ]
        for slot, read in zip(slots, redone):
            samples[slot] = self._answer(read)
        batch.unfinished -= 1
