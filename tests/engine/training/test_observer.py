"""Observers that measure now and then: when they are due, their rows, and what a stop left out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simmim.distributed import World
from simmim.errors import RunError
from simmim.run_folder import RunFolder
from simmim.training import observer as observer_module
from simmim.training.log import RunLog
from simmim.training.observer import Observer, Observers, PeriodicObserver, draw_picture
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


def test_every_observer_measures_hears_and_finishes(make_run: MakeRun) -> None:
    heard: list[tuple[str, str, Any]] = []

    class Listening(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def measures(self, run: Run) -> dict[str, Tensor]:
            return {self.name: torch.ones(())}

        def measured(self, run: Run, values: dict[str, float]) -> None:
            heard.append((self.name, "measured", values))

        def finish(self, run: Run) -> None:
            heard.append((self.name, "finish", None))

    both, run = Observers([Listening("a"), Listening("b")]), make_run(1)
    assert list(both.measures(run)) == ["a", "b"]
    both.measured(run, {"a": 1.0})
    both.finish(run)
    assert heard == [
        ("a", "measured", {"a": 1.0}), ("b", "measured", {"a": 1.0}),
        ("a", "finish", None), ("b", "finish", None),
    ]  # fmt: skip


def test_a_picture_is_drawn_at_the_precision_of_the_run(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dtypes, shown = make_run(3), [], []
    monkeypatch.setattr(run.log, "picture", lambda *given: shown.append(given))
    red = Image.new("RGB", (4, 2), (255, 0, 0))

    def draw(model: Any) -> Image.Image:
        dtypes.append(torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype)
        return red

    for chosen in ("float32", "bf16"):
        monkeypatch.setattr(
            Run, "config", SimpleNamespace(train=SimpleNamespace(precision=chosen)), raising=False
        )
        draw_picture(run, draw, run.model, tmp_path / "pictures", "a picture")
    assert dtypes == [torch.float32, torch.bfloat16]
    with Image.open(tmp_path / "pictures" / "step_00000003.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(red))
    pixels, step, name = shown[0]
    assert (pixels.shape, step, name) == ((2, 4, 3), 3, "a picture")
    draw_picture(run, lambda model: None, run.model, tmp_path / "none", "a picture")
    assert not (tmp_path / "none").exists()
    assert len(shown) == 2


def test_a_picture_that_cannot_be_written_is_a_warning(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(picture: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    warnings: list[str] = []
    run = make_run(3)
    monkeypatch.setattr(observer_module, "save_picture", fail)
    monkeypatch.setattr(run.log, "warn", warnings.append)
    draw_picture(run, lambda model: Image.new("RGB", (1, 1)), run.model, tmp_path, "x")
    assert warnings == [
        f"{tmp_path / 'step_00000003.png'}: could not be written: No space left on device"
    ]
