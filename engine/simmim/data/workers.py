"""Processes that fill micro-batches in shared memory; one that dies or hangs is replaced.

A micro-batch is cut into chunks, and whichever process is free takes the oldest chunk. What is
asked, by whom it was taken, and which sample is being made right now all stand in shared memory, so
a process may be killed at any moment: its chunk is done again by another, and since a sample is a
pure function of (epoch, sample) the bytes are the same. A sample that costs two processes their
lives is given up.
"""

import math
import multiprocessing
import os
import signal
import struct
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import numpy as np
import torch

from simmim.data.producer import Filled, Samples
from simmim.data.task_table import (
    FAILED,
    LAST_WORDS_BYTES,
    READY,
    TAKEN,
    TaskTable,
    get_text,
    put_text,
)
from simmim.errors import DataError

# Processes that a sample may cost before it is given up.
LIVES_PER_SAMPLE = 2

# Replacements without a single chunk in between: the machine is at fault, not a sample.
MAX_FUTILE_REPLACEMENTS = 20

# How often a process that works on a sample is looked at, while the main one waits.
LOOK_INTERVAL_S = 1.0

# How long a process goes on after a first SIGTERM.
GRACE_S = 120

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_TASK_NUMBER = struct.Struct("=i")


class WorkerPool:
    """Fills micro-batches in `workers` processes.

    Args:
        samples: makes the samples; every process has a copy as it is at the fork.
        micro_batch: samples of a micro-batch, at most.
        workers: processes, at least 1.
        prefetch: micro-batches that are ready or being made.
        timeout_s: seconds after which a process that is still at one sample is replaced.
        report: told, in a line, what was replaced and why.
        pin: page-lock the memory for copies to a CUDA device.
    """

    def __init__(
        self,
        samples: Samples,
        micro_batch: int,
        *,
        workers: int,
        prefetch: int,
        timeout_s: float,
        report: Callable[[str], None],
        pin: bool = False,
    ) -> None:
        self.samples, self.micro_batch, self.workers = samples, micro_batch, workers
        self.prefetch, self.timeout_s, self.report, self.pin = prefetch, timeout_s, report, pin

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """See `Producer`.

        Raises:
            DataError: processes die faster than they work.
            RuntimeError: a fault in the code that makes samples; ends with the process's traceback.
        """
        table = TaskTable(self.samples, self.micro_batch, self.workers, self.prefetch + 1, self.pin)
        crew = _Crew(self, table)
        try:
            yield from crew.run(places)
        finally:
            crew.dismiss()
            table.release()


class _Crew:
    """The processes of one pass, as the main process sees them."""

    def __init__(self, pool: WorkerPool, table: TaskTable) -> None:
        self.pool, self.table = pool, table
        self.context = multiprocessing.get_context("fork")
        self.turns = count()
        self.done = np.zeros(len(table.state), bool)
        self.deaths: dict[tuple[int, int], int] = {}
        self.futile = 0
        self.last_look = -math.inf
        # a byte for every task that is ready; closed with this process, which tells the others
        self.asked, self.ask = os.pipe()
        self.answers, self.answer = os.pipe()
        os.set_blocking(self.answers, False)
        self.crew: list[Any] = []
        for worker in range(pool.workers):
            self.crew.append(self._hire(worker))

    def run(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """Micro-batches in order, `prefetch` of them ahead."""
        coming = iter(places)
        free = deque(range(self.table.slots))
        begun: deque[tuple[int, list[tuple[int, int]]]] = deque()
        while True:
            while len(begun) < self.pool.prefetch and (batch := next(coming, None)) is not None:
                slot = free.popleft()
                self._submit(slot, batch)
                begun.append((slot, batch))
            if not begun:
                return
            slot, batch = begun.popleft()
            yield self._collect(slot, batch)
            free.append(slot)

    def _submit(self, slot: int, batch: list[tuple[int, int]]) -> None:
        table = self.table
        for chunk, start in enumerate(range(0, len(batch), table.chunk)):
            task = slot * table.chunks + chunk
            part = batch[start : start + table.chunk]
            table.places[task, : len(part)] = part
            table.size[task] = len(part)
            table.given_up[task] = False
            table.turn[task] = next(self.turns)
            self.done[task] = False
            table.state[task] = READY
            os.write(self.ask, b"\0")

    def _collect(self, slot: int, batch: list[tuple[int, int]]) -> Filled:
        table = self.table
        first = slot * table.chunks
        tasks = range(first, first + math.ceil(len(batch) / table.chunk))
        while not self.done[tasks.start : tasks.stop].all():
            self._wait()
        problems = []
        for place in range(len(batch)):
            chunk, within = divmod(place, table.chunk)
            reason = table.reasons[first + chunk, within]
            if reason[0]:
                problems.append((place, get_text(reason)))
        return Filled(torch.from_numpy(table.pixels[slot, : len(batch)]), problems)

    def _wait(self) -> None:
        """Wait until a task is done, a process is gone, or it is time to look at the processes."""
        sentinels = [process.sentinel for process in self.crew]
        heard = wait([self.answers, *sentinels], min(LOOK_INTERVAL_S, self.pool.timeout_s / 4))
        if self.answers in heard:
            self._hear()
        now = time.monotonic()
        # after a pause of this process the others may have been stopped too: look once more first
        attentive = now - self.last_look < 2 * LOOK_INTERVAL_S
        self.last_look = now
        for worker, process in enumerate(self.crew):
            if process.sentinel in heard:
                process.join()
                self._hear()  # what it said before it died
                self._replace(worker, _cause_of_death(process.exitcode))
            elif attentive and self.table.at[worker] >= 0:
                silent_s = now - self.table.since[worker]
                if silent_s > self.pool.timeout_s:
                    # one that hangs in the kernel dies later, but never comes back to our memory
                    process.kill()
                    process.join(1.0)
                    self._hear()  # the task before may be done, and its answer not yet read
                    self._replace(worker, f"gave no answer for {silent_s:.0f} s")

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            while words := os.read(self.answers, 1024 * _TASK_NUMBER.size):
                for (task,) in _TASK_NUMBER.iter_unpack(words):
                    if self.table.state[task] == FAILED:
                        raise _fault(get_text(self.table.last_words[self.table.owner[task]]))
                    self.done[task] = True
                    self.futile = 0

    def _replace(self, worker: int, what: str) -> None:
        """Fork another process in the place of one that is gone, and hand its task on."""
        table, at = self.table, int(self.table.at[worker])
        unfinished = np.flatnonzero(
            (table.state == TAKEN) & (table.owner == worker) & ~self.done
        ).tolist()
        where = ""
        if at >= 0 and unfinished:
            task = unfinished[0]
            epoch, sample = (int(value) for value in table.places[task, at])
            deaths = self.deaths[epoch, sample] = self.deaths.get((epoch, sample), 0) + 1
            where = f" at {self.pool.samples.name(sample)}"
            if deaths >= LIVES_PER_SAMPLE:
                table.given_up[task, at] = True
                put_text(table.reasons[task, at], f"a data worker {what} at it, {deaths} times")
        self.futile += 1
        if self.futile > MAX_FUTILE_REPLACEMENTS:
            raise DataError(
                f"data workers do not stay alive: the last one {what}{where}; out of memory? Try "
                "fewer --data.workers; the same command resumes from the last checkpoint"
            )
        table.at[worker] = -1
        self.crew[worker] = self._hire(worker)
        for task in unfinished:
            table.state[task] = READY
        # one byte more than tasks: the process may have died between a byte and its task
        os.write(self.ask, bytes(len(unfinished) + 1))
        self.pool.report(f"a data worker {what}{where}; replaced")

    def _hire(self, worker: int) -> Any:
        process = self.context.Process(
            target=self._work, args=(worker,), daemon=True, name=f"simmim-data-{worker}"
        )
        # a signal right after the fork must not meet the handlers of the main process
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with warnings.catch_warnings():
                # Python ≥ 3.12 warns of forks beside threads; ours runs no code that needs them
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return process

    def _work(self, worker: int) -> None:
        """The life of a process: take a task, make its samples, say so."""
        _outlive_the_first_signal()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(self.ask)  # else nobody would notice that the main process is gone
        os.close(self.answers)
        torch.set_num_threads(1)  # a fork has none of the parent's threads
        table, fill = self.table, self.pool.samples.fill
        while os.read(self.asked, 1):
            task = table.take(worker)
            if task is None:
                continue
            try:
                asked = zip(table.arrays(task), table.places[task].tolist())
                for at, (image, (epoch, sample)) in enumerate(asked):
                    if table.given_up[task, at]:
                        image[...] = 0
                        continue
                    table.since[worker], table.at[worker] = time.monotonic(), at
                    reason = fill(image, epoch, sample)
                    if reason:
                        put_text(table.reasons[task, at], reason)
                    else:
                        table.reasons[task, at, 0] = 0
                table.at[worker] = -1
            except Exception as error:
                known = isinstance(error, DataError | OSError)  # data, or the machine's state
                kind, words = ("D", str(error)) if known else ("E", traceback.format_exc())
                put_text(table.last_words[worker], kind + words[-LAST_WORDS_BYTES + 2 :])
                table.at[worker] = -1
                table.state[task] = FAILED
            os.write(self.answer, _TASK_NUMBER.pack(task))

    def dismiss(self) -> None:
        """End the processes, whatever they do."""
        for process in self.crew:
            process.kill()
        for process in self.crew:
            process.join(1.0)
        for descriptor in (self.asked, self.ask, self.answers, self.answer):
            os.close(descriptor)


def _fault(last_words: str) -> Exception:
    kind, text = last_words[:1], last_words[1:]
    return DataError(text) if kind == "D" else RuntimeError(f"a data worker failed\n{text}")


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"


def _outlive_the_first_signal() -> None:
    # Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; the main process needs its
    # workers until it has saved. It ends them itself.
    def end_on_the_second(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(GRACE_S)  # and never outlive a main process that hangs

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_on_the_second)
