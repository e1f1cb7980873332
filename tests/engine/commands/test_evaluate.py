"""`simmim evaluate`: every flag arrives, and what is counted is what is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recorded_calls import Bar, record
from simmim.commands import evaluate as command
from simmim.data.labels import Labels
from simmim.downstream.metrics import ClassificationMetrics
from simmim.errors import DataError

WORLD = SimpleNamespace(device=torch.device("meta"))


def counted(images: list[int], right: list[int], top5: list[int]) -> ClassificationMetrics:
    metrics = ClassificationMetrics(len(images), torch.device("cpu"))
    metrics.counts = torch.tensor([images, right, top5])
    metrics.sums = torch.tensor([0.5 * sum(images), 0.0], dtype=torch.float64)
    return metrics


class Recorded(Bar):
    """The command with everything that it calls recorded.

    Attributes:
        model: what is loaded; `moved` tells where to.
        labels: those of SOURCE.
        matched: those that the model's classes make of them.
    """

    def __init__(self, patch: pytest.MonkeyPatch, metrics: ClassificationMetrics) -> None:
        super().__init__()
        self.classes = tuple(f"class {n}" for n in range(metrics.num_classes))
        self.moved: list[torch.device] = []
        self.model = SimpleNamespace(to=self._move, classes=self.classes)
        self.source = SimpleNamespace(names=["a", "b", "c"])
        self.labels = Labels(np.array([0, 0, 1]), ("x", "y"))
        self.matched = Labels(np.array([0, 1, -1]), self.classes)
        self.worlds = record(patch, command, "pick_world", lambda **given: WORLD)
        self.loaded = record(patch, command, "load_classifier", lambda **given: self.model)
        self.opened = record(
            patch, command, "open_labelled", lambda **given: (self.source, self.labels)
        )
        self.matching = record(patch, command, "match_to_model", lambda **given: self.matched)
        self.views = record(patch, command, "evaluation_view", lambda **given: "view")
        self.bars = record(patch, command, "progress", lambda **given: self)
        self.calls = record(patch, command, "evaluate", lambda **given: self._run(given, metrics))
        self.written = record(patch, command, "write_report", lambda **given: ["no picture"])

    def _move(self, device: torch.device) -> Any:
        self.moved.append(device)
        return self.model

    def _run(self, given: dict[str, Any], metrics: ClassificationMetrics) -> ClassificationMetrics:
        given["report"]("c: broken")
        given["advance"](2)
        return metrics


@pytest.mark.parametrize(
    ("flags", "view", "options"),
    [
        ([], {"margin": None, "value_range": None}, (64, -1, "float32")),
        (
            ["--margin=1.5", "--value-range", "1", "2", "--batch-size=3", "--workers=0",
             "--precision=bf16"],
            {"margin": 1.5, "value_range": (1.0, 2.0)},
            (3, 0, "bf16"),
        ),
    ],
)  # fmt: skip
def test_every_flag_arrives(
    flags: list[str],
    view: dict[str, Any],
    options: tuple[int, int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = counted([1, 1], [1, 0], [1, 1])
    called = Recorded(monkeypatch, metrics)
    assert command.main(["run", "photos", f"--output={tmp_path}", "--device=cpu", *flags]) == 0
    assert called.worlds == [{"device": "cpu"}]
    assert called.loaded == [{"path": "run"}]
    assert called.moved == [WORLD.device]
    assert called.opened[0]["path"] == "photos"
    assert called.matching == [{"labels": called.labels, "model": called.model}]
    assert called.views == [{"model": called.model, **view}]
    assert called.bars == [{"what": "evaluated", "total": 2}]
    assert called.advanced == [(5, 2)]
    (call,) = called.calls
    del call["report"], call["advance"]
    batch_size, workers, precision = options
    assert call == {
        "model": called.model,
        "source": called.source,
        "labels": called.matched,
        "world": WORLD,
        "batch_size": batch_size,
        "view": "view",
        "workers": workers,
        "precision": precision,
    }
    assert called.written == [{"folder": tmp_path, "metrics": metrics, "classes": called.classes}]
    captured = capsys.readouterr()
    assert captured.err == "simmim: c: broken\nsimmim: no picture\n"
    lines = captured.out.splitlines()
    assert lines[0] == (
        "top-1 50.00%  top-5 100.00%  loss 0.5000  on 2 images, 1 without a label skipped"
    )
    assert [line.split()[1:] for line in lines[2:4]] == [
        ["0", "1", "1", "100.00%", "100.00%"],
        ["1", "1", "0", "0.00%", "100.00%"],
    ]
    assert lines[-1] == str(tmp_path)


def test_without_an_output_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Recorded(monkeypatch, counted([1, 1], [1, 0], [1, 1]))
    assert command.main(["run", "photos"]) == 0
    assert called.written == []
    assert called.worlds == [{"device": "auto"}]


def test_a_report_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch, counted([1, 1], [1, 0], [1, 1]))
    for name in command.REPORT_FILES:
        (tmp_path / name).write_text("")
        assert command.main(["run", "photos", f"--output={tmp_path}"]) == 2
        assert f"{name} exists" in capsys.readouterr().err
        (tmp_path / name).unlink()
    assert called.loaded == []
    (tmp_path / command.REPORT_FILES[0]).write_text("")
    assert command.main(["run", "photos", f"--output={tmp_path}", "--overwrite"]) == 0
    assert len(called.written) == 1


def test_the_worst_of_many_classes_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 22 classes one has no image; of the other 21, the best is not listed."""
    right = [*range(1, 11), 40, *range(11, 21), 0]
    metrics = counted([40] * 21 + [0], right, right)
    metrics.sums[1] = 3
    Recorded(monkeypatch, metrics)
    assert command.main(["run", "photos"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "3 answers are not finite, and wrong; see --precision"
    assert lines[2] == "the 20 worst of 21 classes (--output writes all):"
    rows = [line.split() for line in lines[4:]]
    assert [int(row[3]) for row in rows] == list(range(1, 21))
    assert rows[0] == ["class", "0", "40", "1", "2.50%", "2.50%"]


def test_twenty_classes_are_all_listed_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [*range(19, -1, -1)]
    Recorded(monkeypatch, counted([20] * 20, right, right))
    assert command.main(["run", "photos"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[3]) for row in rows] == right


def test_data_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**given: Any) -> None:
        raise DataError("no image can be read")

    Recorded(monkeypatch, counted([1, 1], [1, 0], [1, 1]))
    record(monkeypatch, command, "evaluate", broken)
    assert command.main(["run", "photos"]) == 2
    assert capsys.readouterr().err == "simmim: error: photos: no image can be read\n"
