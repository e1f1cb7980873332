"""Tasks in forked processes: their numbers, their counts, their errors and their ends."""

import errno
import os
import signal
from typing import Any

import pytest

from packed_folders import wait_until
from simmim.errors import RunError
from simmim.packing import tasks
from simmim.packing.tasks import Tally, Tasks


def ticked(_: Tally) -> None:
    """Nobody looks at the progress."""


def done(made: Tasks[Any], numbers: list[int]) -> dict[int, Any]:
    return dict(made.results(numbers, ticked))


@pytest.mark.parametrize("workers", [0, 1, 3, 9])
def test_every_number_has_the_result_of_its_task(workers: int) -> None:
    made = Tasks(lambda number, tally: number**2, workers, "task {}")
    assert done(made, [3, 1, 7, 5]) == {3: 9, 1: 1, 7: 49, 5: 25}


def test_one_worker_does_the_tasks_in_order() -> None:
    made = Tasks(lambda number, tally: os.getpid(), 1, "task {}")
    order = list(made.results([4, 2, 9], ticked))
    assert [number for number, _ in order] == [4, 2, 9]
    assert len({process for _, process in order}) == 1


def test_as_many_processes_work_as_there_are_workers() -> None:
    def work(number: int, tally: Tally) -> int:
        tally.add(done=1)
        wait_until(lambda: tally.total()[0] == 3)  # the others have begun as well
        return os.getpid()

    made = Tasks(work, 3, "task {}")
    assert len(set(done(made, [0, 1, 2]).values()) - {os.getpid()}) == 3


def test_the_tally_is_the_sum_over_the_processes() -> None:
    def work(number: int, tally: Tally) -> list[list[int]]:
        tally.add(done=number, skipped=1)
        wait_until(lambda: tally.total()[1] == 2)
        return [list(map(int, row)) for row in tally._counts]

    seen: list[tuple[int, int]] = []
    made = Tasks(work, 2, "task {}")
    results = dict(made.results([5, 7], lambda tally: seen.append(tally.total())))
    assert seen[-1] == (12, 2)
    assert results[5] == results[7] == [[5, 1], [7, 1]]  # a pair for each process


def test_progress_is_told_while_a_task_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TICK_S", 0.01)

    def work(number: int, tally: Tally) -> None:
        tally.add(done=1)
        wait_until(lambda: tally.total()[1])

    def tick(tally: Tally) -> None:
        if tally.total()[0]:
            tally.add(skipped=1)  # what the task waits for

    assert dict(Tasks(work, 1, "task {}").results([6], tick)) == {6: None}


@pytest.mark.parametrize(
    "error", [RunError("no more"), OSError(errno.ENOSPC, "No space left on device", "x.tar")]
)
def test_an_error_of_a_task_is_raised_here(error: Exception) -> None:
    def work(number: int, tally: Tally) -> None:
        if number == 1:
            raise error

    with pytest.raises(type(error), match=str(error).replace("[", r"\[")) as caught:
        done(Tasks(work, 1, "task {}"), [0, 1, 2])
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"\(signal SIGKILL\): out of memory"),
        (lambda: os._exit(3), r"\(exit code 3\): its own lines above say why"),
    ],
)
def test_a_process_that_dies_is_named_by_its_task(end: Any, words: str) -> None:
    def work(number: int, tally: Tally) -> None:
        if number == 8:
            end()

    with pytest.raises(RunError, match=f"the process at shard 8 died {words}.*what is finished"):
        done(Tasks(work, 1, "shard {}"), [6, 8, 9])


def test_processes_hold_neither_the_callers_descriptors_nor_its_signals() -> None:
    held, kept = os.open("/", os.O_RDONLY), os.open("/", os.O_RDONLY)

    def is_open(descriptor: int) -> bool:
        return os.path.exists(f"/proc/self/fd/{descriptor}")

    def work(number: int, tally: Tally) -> Any:
        signals = [signal.getsignal(kind) for kind in kinds]
        return is_open(held), is_open(kept), signals

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda *_: None) for kind in kinds]
    try:
        results = done(Tasks(work, 2, "task {}", to_close=[held]), [0, 1])
        assert is_open(held)
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
        os.close(held)
        os.close(kept)
    assert set(map(repr, results.values())) == {
        repr((False, True, [signal.SIG_IGN, signal.SIG_DFL]))
    }


def test_processes_end_with_the_caller_of_the_results() -> None:
    made = Tasks(lambda number, tally: os.getpid(), 2, "task {}")
    results = made.results([0, 1, 2, 3], ticked)
    _, process = next(results)
    assert os.path.exists(f"/proc/{process}")
    results.close()
    assert not os.path.exists(f"/proc/{process}")
