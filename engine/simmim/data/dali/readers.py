"""Threads that read and prepare samples."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

# How long a closing pass waits for reads that are under way.
CLOSE_S = 2.0

T = TypeVar("T")


class Read(Generic[T]):
    """A call that a thread makes and, in time, its answer."""

    def __init__(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.future: Future[T] = Future()
        self.since: float | None = None  # monotonic clock; when a thread took it

    def is_answered(self) -> bool:
        """Whether the call is over and raised nothing."""
        return self.future.done() and self.future.exception() is None


class Readers(Generic[T]):
    """Threads that answer calls; the interpreter's exit does not wait for one that hangs.

    Args:
        threads: their number.
    """

    def __init__(self, threads: int) -> None:
        self.tasks: SimpleQueue[Read[T] | None] = SimpleQueue()
        self.closed = False
        self.threads: list[Thread] = []
        for _ in range(threads):
            self.hire()

    def hire(self) -> None:
        """One more thread."""
        thread = Thread(target=self._work, daemon=True, name=f"simmim-read-{len(self.threads)}")
        thread.start()
        self.threads.append(thread)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Read[T]:
        """Call `function` in one of the threads."""
        read = Read(function, arguments)
        self.tasks.put(read)
        return read

    def _work(self) -> None:
        while (read := self.tasks.get()) is not None and not self.closed:
            read.since = time.monotonic()
            try:
                read.future.set_result(read.function(*read.arguments))
            except BaseException as error:
                read.future.set_exception(error)

    def close(self) -> None:
        """End the threads; one that hangs in a read ends when the read does."""
        self.closed = True
        for _ in self.threads:
            self.tasks.put(None)
        until = time.monotonic() + CLOSE_S
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
