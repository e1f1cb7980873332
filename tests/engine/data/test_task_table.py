"""The memory that data workers share: which task is next, where its samples go, texts in bytes."""

import fcntl
import multiprocessing
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simmim.data import task_table
from simmim.data.producer import SourceSamples
from simmim.data.task_table import (
    FREE,
    LARGEST_CHUNK,
    READY,
    TAKEN,
    TaskTable,
    get_text,
    put_text,
)
from stand_in_images import StandInSource, StandInView

SAMPLES = SourceSamples(StandInSource(9), StandInView())


def table(micro_batch: int = 6, workers: int = 1, slots: int = 2, pin: bool = False) -> TaskTable:
    return TaskTable(SAMPLES, micro_batch, workers, slots, pin)


@pytest.mark.parametrize(
    ("micro_batch", "workers", "slots", "chunk", "chunks"),
    [
        (6, 1, 2, 2, 3),  # 6 / 4 samples would be a process's quarter
        (64, 1, 3, LARGEST_CHUNK, 4),
        (3, 1, 9, 3, 1),  # no chunk spans batches
        (5, 8, 2, 1, 5),
        (10, 1, 2, 3, 4),  # the last one has a single sample
    ],
)
def test_a_batch_is_cut_into_chunks_for_all_processes(
    micro_batch: int, workers: int, slots: int, chunk: int, chunks: int
) -> None:
    made = table(micro_batch, workers, slots)
    assert (made.chunk, made.chunks, made.slots) == (chunk, chunks, slots)
    assert made.pixels.shape == (slots, micro_batch, 3)
    assert made.pixels.dtype == np.int32
    assert made.state.tolist() == [FREE] * (slots * chunks)
    assert made.places.shape == (slots * chunks, chunk, 2)
    assert made.at.tolist() == [-1] * workers
    made.release()


def test_the_oldest_task_that_is_ready_is_taken() -> None:
    made = table()
    made.turn[:] = [5, 1, 9, 3, 0, 4]
    made.state[:] = [READY, TAKEN, READY, READY, FREE, READY]
    assert [made.take(worker) for worker in (1, 0, 1, 1, 0)] == [3, 5, 0, 2, None]
    assert made.state.tolist() == [TAKEN] * 4 + [FREE, TAKEN]
    assert [int(made.owner[task]) for task in (3, 5, 0, 2)] == [1, 0, 1, 1]
    made.release()


def test_a_tasks_arrays_are_those_of_its_samples() -> None:
    made = table(micro_batch=10)
    assert (made.chunk, made.chunks) == (3, 4)
    made.size[:] = [3, 3, 3, 1, 3, 2, 0, 0]
    for task in range(8):
        made.arrays(task)[:] = 1 + task
    filled = made.pixels[..., 0].tolist()
    assert filled == [[1, 1, 1, 2, 2, 2, 3, 3, 3, 4], [5, 5, 5, 6, 6, 0, 0, 0, 0, 0]]
    made.release()


def test_other_processes_see_what_is_written() -> None:
    made = table()
    process = multiprocessing.get_context("fork").Process(target=made.pixels.fill, args=(7,))
    process.start()
    process.join()
    assert (made.pixels == 7).all()
    made.release()


def test_tasks_are_taken_one_at_a_time_and_nothing_stays_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, held = table(), []
    monkeypatch.setattr(
        task_table,
        "fcntl",
        SimpleNamespace(
            lockf=lambda descriptor, what: held.append((descriptor, what)),
            LOCK_EX=fcntl.LOCK_EX,
            LOCK_UN=fcntl.LOCK_UN,
        ),
    )
    assert made.take(0) is None
    made.state[2] = READY
    assert made.take(0) == 2
    assert held == [(made.lock, fcntl.LOCK_EX), (made.lock, fcntl.LOCK_UN)] * 2
    before = len(os.listdir("/proc/self/fd"))
    made.release()
    assert len(os.listdir("/proc/self/fd")) == before - 1


@pytest.mark.parametrize("result", [0, 1])
def test_memory_is_page_locked_where_that_is_asked_for(
    result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def register(*arguments: int) -> int:
        calls.append(("register", *arguments))
        return result

    def unregister(*arguments: int) -> None:
        calls.append(("unregister", *arguments))

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(task_table, "_cuda_runtime", lambda: runtime)
    table().release()
    assert not calls
    made = table(pin=True)
    assert made.pinned is (result == 0)
    where = made.pixels.ctypes.data
    made.release()
    expected = [("register", where, made.pixels.nbytes, 0), ("unregister", where)]
    assert calls == (expected if result == 0 else expected[:1])


def test_a_text_is_cut_to_the_bytes_that_there_are() -> None:
    where = np.full(8, 255, np.uint8)
    put_text(where, "too long to fit")
    assert get_text(where) == "too lon"
    put_text(where, "äß")
    assert get_text(where) == "äß"
    assert where.tolist()[4:] == [0] * 4
    put_text(where, "")
    assert get_text(where) == ""
    put_text(where, "aaaaaaä")  # cut within a letter
    assert get_text(where) == "aaaaaa\ufffd"
    put_text(where, "\udcff")
    assert get_text(where) == "\\udcff"
