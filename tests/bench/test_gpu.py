"""bench/gpu.py: its plan, its record, and how stages end. What they measure needs a GPU."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu import STAGES, Stage, main, run_all, run_apart, run_stage
from bench.gpu_stages import stage as stage_module


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")


def read_record(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(output: Path, minutes: float = 1.0) -> argparse.Namespace:
    return argparse.Namespace(output=output, minutes=minutes, tiny=False)


def test_stages_fit_into_a_quarter_of_an_hour_and_exist() -> None:
    assert sum(stage.seconds for stage in STAGES) <= 15 * 60
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    assert names[0] == "environment"
    for stage in STAGES:
        module, _, function = stage.function.partition(".")
        assert callable(getattr(importlib.import_module(f"bench.gpu_stages.{module}"), function))


def test_every_stage_is_run_until_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, limits = [0.0], dict[str, float]()
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def apart(stage: Stage, limit: float, output: Path, tiny: bool) -> tuple[str, str]:
        limits[stage.name] = limit
        now[0] += limit
        return ("failed", "it broke") if stage.name == "two" else ("done", "")

    monkeypatch.setattr(gpu, "run_apart", apart)
    stages = [Stage(name, "x.run", 25) for name in ("one", "two", "three", "four")]
    output = tmp_path / "results" / "card.jsonl"
    assert run_all(stages, options(output)) == 1  # for the one that failed
    assert limits == {"one": 25, "two": 25, "three": 10}
    head, *ends = read_record(output)
    assert (head["label"], head["device"], head["minutes"]) == ("measured", "A card", 1.0)
    assert [end["status"] for end in ends] == ["done", "failed", "done", "no time left"]
    assert ends[1]["why"] == "it broke"


def test_a_record_is_not_overwritten_and_wrong_stages_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "card.jsonl"
    output.write_text("kept\n")
    assert run_all([], options(output)) == 2
    assert "is there already" in capsys.readouterr().err
    assert output.read_text() == "kept\n"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only=steps,setps"])
    with pytest.raises(SystemExit):
        main()
    assert "no stage setps; there are environment, " in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        main()
    assert "sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "why"),
    [
        ("print('fine')", "done", ""),
        ("raise ValueError('of the stage')", "failed", "ValueError: of the stage"),
        (
            "import sys, time; print('before', file=sys.stderr, flush=True); time.sleep(60)",
            "out of time",
            "before",
        ),
    ],
)
def test_how_a_process_ends(
    code: str, status: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stage.py"
    script.write_text(code)
    monkeypatch.setattr(gpu, "__file__", str(script))
    found = run_apart(Stage("one", "x.run", 9), 2.0, tmp_path / "out.jsonl", tiny=False)
    assert found[0] == status
    assert why in found[1]


def test_a_stage_records_each_result_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    given: list[float] = []

    def measure(emit: Any, seconds: float) -> None:
        given.append(seconds)
        emit("first", value=1)
        assert [line["value"] for line in read_record(output)] == [1]
        emit("second", value=2)
        raise RuntimeError("later")

    monkeypatch.setattr("bench.gpu_stages.environment.run", measure)
    with pytest.raises(RuntimeError, match="later"):
        run_stage("environment", 10.0, output)
    assert given == [8.0]
    assert read_record(output) == [
        {"stage": "environment", "what": "first", "value": 1},
        {"stage": "environment", "what": "second", "value": 2},
    ]


def test_rates_where_no_time_was_measured() -> None:
    assert stage_module.rate(10.0, 0.0) is None
    assert stage_module.rate(10.0, 2.0) == 5000.0
