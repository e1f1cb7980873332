"""Runs numbered tasks in forked processes, none of which outlives the caller."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from mmap import mmap
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import numpy as np

from simmim.errors import RunError

T = TypeVar("T")

# How often the caller hears of progress.
TICK_S = 0.2


class Tally:
    """Images done and skipped so far, one pair for each process, in memory that all share."""

    def __init__(self, workers: int) -> None:
        self._counts = np.frombuffer(mmap(-1, 16 * workers), dtype=np.int64).reshape(workers, 2)
        self._parent, self._worker = os.getpid(), 0

    def enter(self, worker: int) -> None:
        """Called in the process whose pair is number `worker`."""
        self._worker = worker

    def add(self, *, done: int = 0, skipped: int = 0) -> None:
        """Count images, and end this process if the one that began it is gone."""
        self._counts[self._worker] += done, skipped
        self.end_if_orphaned()

    def end_if_orphaned(self) -> None:
        """End this process if the one that began it is gone."""
        if os.getpid() != self._parent and os.getppid() != self._parent:
            os._exit(1)

    def total(self) -> tuple[int, int]:
        """(done, skipped) of all processes."""
        done, skipped = self._counts.sum(axis=0)
        return int(done), int(skipped)


class Tasks(Generic[T]):
    """Runs `task(number, tally)` for each number.

    Args:
        task: the work; a RunError or OSError that it raises is raised again by `results`.
        workers: processes.
        name: what a number is called when its process dies: "shard {}".
        to_close: descriptors that the processes must not hold.
    """

    def __init__(
        self,
        task: Callable[[int, Tally], T],
        workers: int,
        name: str,
        to_close: Sequence[int] = (),
    ) -> None:
        self.task, self.workers, self.name = task, max(1, workers), name
        self.to_close = to_close
        self.tally = Tally(self.workers)

    def results(
        self, numbers: Iterable[int], tick: Callable[[Tally], None]
    ) -> Generator[tuple[int, T], None, None]:
        """(number, result) in the order of completion.

        Raises:
            RunError: a process died, as one does that is out of memory.
        """
        waiting = list(numbers)[::-1]
        context = multiprocessing.get_context("fork")
        pipes: dict[Connection, tuple[BaseProcess, list[int]]] = {}
        try:
            for worker in range(min(self.workers, len(waiting))):
                ours, theirs = context.Pipe()
                # it must not hold the other ends: their closing is how a process sees we are gone
                process: BaseProcess = context.Process(
                    target=self._work, args=(worker, theirs, [*pipes, ours]), daemon=True
                )
                process.start()
                theirs.close()
                pipes[ours] = process, [waiting.pop()]
                ours.send(pipes[ours][1][0])
            while any(at for _, at in pipes.values()):
                for pipe in wait([p for p, (_, at) in pipes.items() if at], TICK_S):
                    assert isinstance(pipe, Connection)
                    process, at = pipes[pipe]
                    result = self._receive(pipe, process, at.pop())
                    if waiting:
                        at.append(waiting.pop())
                        with suppress(ConnectionError):  # it died: the next look at it says so
                            pipe.send(at[0])
                    yield result
                tick(self.tally)
        finally:
            for pipe, (process, _) in pipes.items():
                process.kill()
                process.join()
                pipe.close()

    def _receive(self, pipe: Connection, process: BaseProcess, number: int) -> tuple[int, T]:
        try:
            result, error = pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            code = process.exitcode or 0
            how = (
                f"signal {signal.Signals(-code).name}): out of memory, perhaps; try fewer --workers"
                if code < 0
                else f"exit code {code}): its own lines above say why"
            )
            raise RunError(
                f"the process at {self.name.format(number)} died ({how}; what is finished stays, "
                "the same command goes on"
            ) from None
        if error is not None:
            raise error
        return number, result

    def _work(self, worker: int, pipe: Connection, inherited: list[Connection]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides, for all
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in inherited:
            other.close()
        for descriptor in self.to_close:
            os.close(descriptor)
        self.tally.enter(worker)
        with suppress(EOFError, ConnectionError):  # the main process is gone
            while True:
                number = pipe.recv()
                try:
                    answer = self.task(number, self.tally), None
                except (RunError, OSError) as error:
                    pipe.send((None, error))
                else:
                    pipe.send(answer)
