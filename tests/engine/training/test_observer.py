"""Observers that measure now and then: when they are due, their rows, and what a stop left out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simmim.distributed import World
from simmim.errors import RunError
from simmim.run_folder import RunFolder
from simmim.training.log import RunLog
from simmim.training.observer import Observer, Observers, PeriodicObserver
from simmim.training.run import Run
from small_run import CPU, make_state

ALONE = World(0, 1, CPU)
IMAGES, BATCH = 20, 4  # an epoch of five steps


MakeRun = Callable[[int], Run]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """A run of 12 steps that stands at a step; every one is in the same folder."""
    folder, logs = RunFolder(tmp_path), list[RunLog]()
    loader: Any = SimpleNamespace(source=SimpleNamespace(names=["x"] * IMAGES), wait_s=0.0)
    unreadable: Any = SimpleNamespace(samples=set())

    def make(step: int) -> Run:
        state = make_state("--train.steps=12", f"--train.batch_size={BATCH}")
        state.step = step
        logs.append(RunLog(folder, 12, is_main=True, tensorboard=False))
        return Run(state, loader, folder, logs[-1], unreadable, -1)

    yield make
    for log in logs:
        log.close()


class Counting(PeriodicObserver):
    """Measures nothing but how often it was asked."""

    def __init__(self, every_epochs: float) -> None:
        super().__init__(every_epochs, ALONE)
        self.steps: list[int] = []
        self.told: list[int] = []
        self.problem: Exception | None = None

    def records(self, run: Run) -> Path:
        return run.folder.validations

    def measure(self, run: Run) -> int:
        assert self.busy  # a signal may cut it short
        self.steps.append(run.step)
        return 10 * run.step

    def row(self, measurement: int) -> dict[str, Any]:
        return {"value": measurement}

    def keep(self, run: Run, measurement: int, row: dict[str, Any]) -> None:
        if self.problem is not None:
            raise self.problem

    def tell(self, run: Run, measurement: int, row: dict[str, Any]) -> None:
        self.told.append(measurement)


def drive(run: Run, observer: Observer, first: int, last: int) -> None:
    """The steps from `first` to `last`, as the loop announces them."""
    for step in range(first, last + 1):
        run.state.step = step
        observer.observe(run, last=step == run.total, stopping=False)


@pytest.mark.parametrize(
    ("every_epochs", "due"),
    [(1, [5, 10, 12]), (2, [10, 12]), (0.5, [3, 5, 8, 10, 12]), (99, [12])],
)
def test_due_by_epochs_and_at_the_end(
    make_run: MakeRun, every_epochs: float, due: list[int]
) -> None:
    run, observer = make_run(0), Counting(every_epochs)
    observer.begin(run)
    drive(run, observer, 1, 12)
    assert observer.steps == due
    assert observer.told == [10 * step for step in due]
    rows = run.log.recorded(run.folder.validations)
    assert rows == [
        {"step": step, "epoch": step * BATCH / IMAGES, "value": 10 * step} for step in due
    ]
    assert observer.rows == rows


def test_what_a_stop_left_out_is_made_up(make_run: MakeRun) -> None:
    run, observer = make_run(0), Counting(1)
    drive(run, observer, 1, 4)
    run.state.step = 5
    observer.observe(run, last=False, stopping=True)
    assert observer.steps == []
    for expected in ([5], []):  # at the next start, and not once more at the one after
        again = make_run(5)
        late = Counting(1)
        late.begin(again)
        assert late.steps == expected


def test_a_fresh_run_measures_nothing_before_its_first_step(make_run: MakeRun) -> None:
    observer = Counting(1)
    observer.begin(make_run(0))
    assert observer.steps == []


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device", "best"), RunError("best: No space left")]
)
def test_what_cannot_be_kept_ends_the_run_without_a_row(
    make_run: MakeRun, problem: Exception
) -> None:
    run, observer = make_run(0), Counting(1)
    observer.problem = problem
    with pytest.raises(RunError, match="best: No space left"):
        drive(run, observer, 1, 5)
    assert run.log.recorded(run.folder.validations) == []
    assert observer.rows == []
    assert not observer.busy


def test_several_observers_are_asked_in_order(make_run: MakeRun) -> None:
    first, second = Counting(1), Counting(2)
    both, run = Observers([first, second]), make_run(0)
    both.begin(run)
    assert not both.busy
    second.busy = True
    assert both.busy
    second.busy = False
    drive(run, both, 1, 10)
    assert (first.steps, second.steps) == ([5, 10], [10])
