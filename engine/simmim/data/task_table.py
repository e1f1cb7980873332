"""The memory that data workers share with the main process: tasks, who is at which, and pixels."""

import fcntl
import math
import mmap
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.data.producer import Samples

# Samples that a process takes at a time, at most.
LARGEST_CHUNK = 16

# Chunks that each process should find waiting, so that none is idle at the end of a batch.
CHUNKS_PER_WORKER = 4

# Bytes kept of the reason why a sample could not be made, and of a process's last words.
REASON_BYTES, LAST_WORDS_BYTES = 200, 8000

# What a task may be.
FREE, READY, TAKEN, FAILED = range(4)


class TaskTable:
    """The shared memory: pixels of every slot, tasks (a slot's chunks), what each process does.

    No lock file or segment has a name, so nothing is left behind, however the run ends, and the
    size of /dev/shm does not matter.
    """

    def __init__(
        self, samples: Samples, micro_batch: int, workers: int, slots: int, pin: bool
    ) -> None:
        share = micro_batch * (slots - 1) / (workers * CHUNKS_PER_WORKER)
        self.chunk = max(1, min(LARGEST_CHUNK, micro_batch, math.ceil(share)))
        self.chunks = math.ceil(micro_batch / self.chunk)
        self.slots, tasks = slots, slots * self.chunks
        self.pixels = _shared((slots, micro_batch, *samples.shape), samples.dtype)
        self.state = _shared((tasks,), "int8")
        self.owner = _shared((tasks,), "int32")
        self.turn = _shared((tasks,), "int64")  # the lowest goes first
        self.size = _shared((tasks,), "int32")
        self.places = _shared((tasks, self.chunk, 2), "int64")  # (epoch, sample)
        self.given_up = _shared((tasks, self.chunk), "bool")
        self.reasons = _shared((tasks, self.chunk, REASON_BYTES), "uint8")
        self.at = _shared((workers,), "int32")  # place within the chunk, -1 between samples
        self.since = _shared((workers,), "float64")  # monotonic clock
        self.last_words = _shared((workers, LAST_WORDS_BYTES), "uint8")
        self.at[:] = -1
        # a record lock is let go when its process dies, wherever that was
        self.lock = os.memfd_create("simmim-tasks")
        self.pinned = pin and _register(self.pixels)

    def take(self, worker: int) -> int | None:
        """The oldest task that is ready, now `worker`'s."""
        fcntl.lockf(self.lock, fcntl.LOCK_EX)
        try:
            ready = np.flatnonzero(self.state == READY)
            if not len(ready):
                return None
            task = int(ready[np.argmin(self.turn[ready])])
            self.owner[task] = worker
            self.state[task] = TAKEN
            return task
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN)

    def arrays(self, task: int) -> NDArray[Any]:
        """The arrays of a task's samples."""
        slot, chunk = divmod(task, self.chunks)
        return self.pixels[slot, chunk * self.chunk :][: self.size[task]]

    def release(self) -> None:
        """Give back what outlives the arrays."""
        if self.pinned:
            _cuda_runtime().cudaHostUnregister(self.pixels.ctypes.data)
        os.close(self.lock)


def _shared(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    kind = np.dtype(dtype)
    # anonymous: inherited over a fork, and gone with the last process
    memory = mmap.mmap(-1, max(1, math.prod(shape) * kind.itemsize))
    return np.frombuffer(memory, kind, count=math.prod(shape)).reshape(shape)


def _register(pixels: NDArray[Any]) -> bool:
    # not run on a GPU; where it fails, copies are merely not asynchronous
    return int(_cuda_runtime().cudaHostRegister(pixels.ctypes.data, pixels.nbytes, 0)) == 0


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def put_text(where: NDArray[np.uint8], text: str) -> None:
    """Write a text that another process reads, cut to the bytes that there are."""
    encoded = text.encode("utf-8", "backslashreplace")[: where.size - 1]
    where[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    where[len(encoded) :] = 0


def get_text(where: NDArray[np.uint8]) -> str:
    """The text that `put_text` wrote."""
    return where.tobytes().split(b"\0", 1)[0].decode("utf-8", "replace")
