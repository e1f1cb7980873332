"""What observers and the loop ask of a run: its model, its epochs and its clock."""

from types import SimpleNamespace
from typing import Any

import pytest

from simmim.training import run as run_module
from simmim.training.run import Run
from small_run import make_state


def make(**loader: Any) -> Run:
    given: Any = SimpleNamespace(
        source=SimpleNamespace(names=["x"] * 20), wait_s=loader.get("wait_s", 0.0)
    )
    nothing: Any = None
    state = make_state("--train.steps=12", "--train.batch_size=4")
    return Run(state, given, nothing, nothing, nothing, 7)


def test_steps_and_epochs() -> None:
    run = make()
    run.state.step = 5
    assert (run.step, run.total, run.saved_step, run.num_images) == (5, 12, 7, 20)
    assert [run.epoch_of(step) for step in (0, 5, 6)] == [0.0, 1.0, 1.2]
    assert run.config is run.state.config
    assert run.world is run.state.world


def test_the_model_is_the_averaged_one_if_there_is_one() -> None:
    run = make()
    assert run.model is run.state.model
    run.state.averaged = make_state().model
    assert run.model is run.state.averaged


def test_the_clock_counts_from_its_last_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    run = make(wait_s=3.0)  # what the loader waited before does not count
    now[0], run.loader.wait_s = 110.0, 5.0
    assert run.clock() == (10.0, 2.0)
    run.restart_clock()
    now[0], run.loader.wait_s = 114.0, 5.5
    assert run.clock() == (4.0, 0.5)
