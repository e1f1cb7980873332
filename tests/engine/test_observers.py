"""What a pre-training run does between its steps: when it draws, and how often it warns."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simmim import observers
from simmim.distributed import World
from simmim.observers import WARNING_INTERVAL, MethodMeasures, Pictures, say_where
from small_run import CPU


def run_at(step: int, every: int = 0, saved: int = -1, rank: int = 0) -> Any:
    """A run, as far as observers of this file look at it."""
    log = SimpleNamespace(lines=[])
    log.info = log.warn = log.lines.append
    return SimpleNamespace(
        step=step, saved_step=saved, world=World(rank, 2, CPU), log=log, clocks=[],
        config=SimpleNamespace(log=SimpleNamespace(picture_every_steps=every)),
        restart_clock=lambda: None, folder=SimpleNamespace(pictures=Path("pictures")),
        state=SimpleNamespace(model="model"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("every", "saved", "rank", "drawn"),
    [
        (3, 5, 0, [3, 6, 7]),  # the last step is 7
        (0, 5, 0, [5]),  # with every checkpoint
        (-1, 5, 0, []),
        (3, 5, 1, []),  # only the main process draws
    ],
)
def test_pictures_are_drawn_as_configured(
    monkeypatch: pytest.MonkeyPatch, every: int, saved: int, rank: int, drawn: list[int]
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        observers, "draw_picture", lambda run, *given: calls.append((run.step, given))
    )
    draw: Any = object()
    clocks: list[int] = []
    for step in range(1, 8):
        run = run_at(step, every, saved, rank)
        run.restart_clock = lambda step=step: clocks.append(step)
        Pictures(draw).observe(run, last=step == 7, stopping=False)
    assert [step for step, _ in calls] == drawn
    assert all(given == (draw, "model", Path("pictures"), "reconstruction") for _, given in calls)
    assert clocks == drawn  # the time of drawing is not that of steps


def test_a_warning_of_the_method_comes_once_in_a_thousand_steps() -> None:
    method: Any = SimpleNamespace(
        measures=lambda model: {"std": model}, warning=lambda values: f"std {values['std']}"
    )
    watch = MethodMeasures(method)
    assert watch.measures(run_at(1)) == {"std": "model"}
    heard = []
    for step in range(10, 2500, 10):
        run = run_at(step)
        watch.measured(run, {"std": 0.5})
        heard += run.log.lines
    assert heard == [f"step {step}: std 0.5" for step in (10, 1010, 2010)]
    assert WARNING_INTERVAL == 1000
    other = run_at(9000, rank=1)
    watch.measured(other, {"std": 0.5})
    assert other.log.lines == []
    method.warning = lambda values: ""
    quiet = run_at(9999)
    watch.measured(quiet, {"std": 0.5})
    assert quiet.log.lines == []


def test_the_log_says_where_pictures_are_if_there_are_any(tmp_path: Path) -> None:
    for rank, folder, lines in (
        (0, tmp_path, [f"pictures in {tmp_path}"]),
        (1, tmp_path, []),
        (0, tmp_path / "none", []),
    ):
        run = run_at(5, rank=rank)
        say_where(run, "pictures", folder)
        assert run.log.lines == lines
        run.folder.pictures = folder
        Pictures(lambda model: None).finish(run)
        assert run.log.lines == 2 * lines
