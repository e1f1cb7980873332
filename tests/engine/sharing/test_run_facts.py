"""What a run folder tells of its weights: their step, their loss, their results; no folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from simmim.run_folder import RunFolder
from simmim.sharing.run_facts import LOSS_STEPS, RunFacts, read_facts
from simmim.training import checkpoint


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of 300 steps with checkpoints at 100, 200 and 300, and an evaluation at each."""
    folder = RunFolder(tmp_path / "home" / "mine")
    folder.pictures.mkdir(parents=True)
    folder.starts.write_text('{"starts": [{"processes": 1}, {"processes": 2}]}')
    folder.config.write_text(
        'output = "/home/me/mine"\nseed = 3\n[data]\npath = "/home/me/animals"\n'
        'mean = [0.5, 0.25]\n[model]\nname = "swin_base"\n'
    )
    rows = [{"step": n, "loss": float(n), "epoch": n / 100} for n in range(1, 301)]
    write_lines(folder.metrics, rows)
    evaluations = [
        {"step": 100, "top1": 0.5, "images": 9},
        {"step": 200, "top1": 0.75, "images": 9},
        {"step": 300, "top1": 0.75, "images": 9},
    ]
    write_lines(folder.evaluations, evaluations)
    for name in ("step_00000100.png", "step_00000200.png", "notes.txt"):
        (folder.pictures / name).write_text("")
    for step in (100, 200, 300):
        place = folder.checkpoints / f"step_{step:08d}"
        place.mkdir(parents=True)
        state = {"data": {"images": 9, "digest": f"d{step}"}, "unreadable": [1] * (step // 100)}
        (place / "state.json").write_text(json.dumps(state))
    assert list(checkpoint.steps(folder.checkpoints)) == [100, 200, 300]
    return folder


def facts_of(place: Path) -> RunFacts:
    facts = read_facts(place)
    assert facts is not None
    return facts


def test_a_run_is_its_newest_checkpoint(run: RunFolder) -> None:
    assert facts_of(run.root) == RunFacts(
        name="mine",
        recipe={
            "output": "mine",
            "seed": 3,
            "data": {"path": "animals", "mean": [0.5, 0.25]},
            "model": {"name": "swin_base"},
        },
        step=300,
        epochs=3.0,
        data={"images": 9, "digest": "d300", "unreadable": 3},
        loss=250.5,  # of 201 to 300
        evaluation={"step": 300, "top1": 0.75, "images": 9},
        environment={"processes": 2},
        picture=run.pictures / "step_00000200.png",
    )


@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_an_earlier_checkpoint_is_told_as_of_its_step(run: RunFolder, inside: str) -> None:
    facts = facts_of(run.checkpoints / "step_00000100" / inside)
    assert (facts.name, facts.step, facts.epochs) == ("mine", 100, 1.0)
    assert facts.loss == 50.5  # of 1 to 100
    assert facts.evaluation["step"] == 100


def test_the_best_weights_are_those_of_the_first_best_evaluation(run: RunFolder) -> None:
    facts = facts_of(run.best_weights)
    assert (facts.step, facts.epochs, facts.loss) == (200, 2.0, 150.5)
    assert facts.evaluation == {"step": 200, "top1": 0.75, "images": 9}
    run.evaluations.unlink()
    assert (facts_of(run.best_weights).step, facts_of(run.best_weights).evaluation) == (300, {})


def test_a_step_that_was_evaluated_twice_has_the_newer_result(run: RunFolder) -> None:
    rows = [{"step": 300, "top1": 0.25}, {"step": 300, "top1": 0.5}]
    write_lines(run.evaluations, rows)
    assert facts_of(run.root).evaluation == rows[1]


def test_the_loss_is_the_mean_of_those_that_there_are(run: RunFolder) -> None:
    assert LOSS_STEPS == 100
    write_lines(run.metrics, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}])
    facts = facts_of(run.root)
    assert (facts.loss, facts.step, facts.epochs) == (2.0, 300, None)
    write_lines(run.metrics, [])
    facts = facts_of(run.root)
    assert (facts.loss, facts.step, facts.epochs) == (None, 300, None)


def test_without_a_checkpoint_the_last_row_tells_the_step(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"starts": []}')
    write_lines(tmp_path / "metrics.jsonl", [{"step": 7, "loss": 1.0, "epoch": 0.5}])
    facts = facts_of(tmp_path)
    assert (facts.step, facts.epochs, facts.environment) == (7, 0.5, {})
    assert facts.data == {"unreadable": 0}


def test_data_is_told_by_the_newest_checkpoint_that_knows(run: RunFolder) -> None:
    (run.checkpoints / "step_00000300" / "state.json").write_text("{")
    assert facts_of(run.root).data == {"images": 9, "digest": "d200", "unreadable": 2}


def test_only_what_lies_in_a_run_has_one(run: RunFolder) -> None:
    assert read_facts(run.root.parent / "model.safetensors") is None
    deep = run.checkpoints / "step_00000300" / "model.safetensors"
    assert facts_of(deep).step == 300
    assert read_facts(deep / "one" / "too_deep") is None
