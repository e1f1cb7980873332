"""What several commands take: every flag has its name, its type and its default."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recorded_calls import record
from simmim.commands import arguments as module
from simmim.commands.arguments import (
    add_compute,
    add_data,
    add_value_range,
    open_labelled,
    pick_world,
    progress,
)
from simmim.data.labels import Labels
from simmim.errors import DataError


def data_flags(*flags: str, labelled: bool = True) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_data(parser, labelled=labelled)
    return vars(parser.parse_args(flags))


def compute_flags(*flags: str, **options: int) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_compute(parser, **options)
    return vars(parser.parse_args(flags))


def test_flags_of_reading_images() -> None:
    unlabelled = {"workers": -1, "value_range": None}
    assert data_flags(labelled=False) == unlabelled
    assert data_flags() == unlabelled | {"labels": None, "classes": None, "first_number": None}
    flags = ["--labels=a.csv", "--classes=b.txt", "--first-number=1", "--workers=3"]
    assert data_flags(*flags, "--value-range", "2", "9.5") == {
        "labels": Path("a.csv"),
        "classes": Path("b.txt"),
        "first_number": 1,
        "workers": 3,
        "value_range": (2.0, 9.5),
    }


@pytest.mark.parametrize(("low", "high"), [("3", "3"), ("4", "3"), ("nan", "1")])
def test_a_range_of_values_rises(low: str, high: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_value_range(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--value-range", low, high])
    assert stop.value.code == 2
    assert "--value-range LOW HIGH: LOW must be less than HIGH" in capsys.readouterr().err


def test_flags_of_where_a_model_runs() -> None:
    assert compute_flags() == {"device": "auto", "precision": "float32", "batch_size": 64}
    assert compute_flags(batch_size=7)["batch_size"] == 7
    flags = ["--device=cuda", "--precision=fp16", "--batch-size=1"]
    assert compute_flags(*flags) == {"device": "cuda", "precision": "fp16", "batch_size": 1}
    for wrong in ("--device=tpu", "--precision=fp8", "--batch-size=0", "--batch-size=-1"):
        with pytest.raises(argparse.ArgumentError):
            compute_flags(wrong)


@pytest.mark.parametrize(
    ("device", "there", "taken"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda:0"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda:0"),
    ],
)
def test_the_device_that_is_meant(
    device: str, there: bool, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    world = pick_world(device)
    assert (world.rank, world.size, world.device) == (0, 1, torch.device(taken))


def test_a_device_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        pick_world("cuda")


def test_labels_are_read_as_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    source, labels = SimpleNamespace(names=["a"]), Labels(np.zeros(1, np.int64), ("x",))
    opened = record(monkeypatch, module, "open_source", lambda **given: source)
    asked = record(monkeypatch, module, "labels_of", lambda **given: labels)
    options = argparse.Namespace(**data_flags("--labels=a", "--classes=b", "--first-number=0"))
    assert open_labelled("photos", options) == (source, labels)
    assert list(opened[0].values()) == ["photos"]
    assert asked == [
        {
            "source": source,
            "label_file": Path("a"),
            "class_file": Path("b"),
            "first_number": 0,
        }
    ]


def test_images_without_any_label_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    record(monkeypatch, module, "open_source")
    record(monkeypatch, module, "labels_of")
    with pytest.raises(DataError, match=r"^photos: nothing tells the classes of its images"):
        open_labelled("photos", argparse.Namespace(**data_flags()))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    bar = progress("read", 9)
    assert bar.disable is not terminal
    (task,) = bar.tasks
    assert (task.description, task.total) == ("read", 9)
    assert bar.live.console.stderr
    assert bar.live.transient
