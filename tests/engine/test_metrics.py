"""Counting answers: against a loop by hand, in parts, with gaps; tables and pictures."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.distributed import World
from simmim.downstream import metrics as counting
from simmim.downstream.metrics import ClassificationMetrics, report_files, write_report
from simmim.downstream.plots import save_confusion, save_layers

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def draw(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(-1, classes, (count,), generator=generator)
    return logits, labels


@pytest.mark.parametrize("classes", [2, 4, 7, 30])
def test_counts_are_those_of_a_loop(classes: int) -> None:
    logits, labels = draw(200, classes)
    metrics = ClassificationMetrics(classes, CPU)
    for part in range(0, 200, 64):  # in parts, the last of another size
        metrics.add(logits[part : part + 64], labels[part : part + 64])
    metrics.merge(ALONE)
    confusion = np.zeros((classes, classes), int)
    top1 = top5 = images = 0
    loss = 0.0
    for row, label in zip(logits.double(), labels.tolist()):
        if label < 0:
            continue
        order = row.argsort(descending=True).tolist()
        images += 1
        top1 += order[0] == label
        top5 += label in order[:5]
        confusion[label, order[0]] += 1
        loss -= float(row.log_softmax(0)[label])
    assert metrics.num_images == images
    assert metrics.top1 == top1 / images
    assert metrics.top5 == top5 / images
    assert metrics.loss == pytest.approx(loss / images, rel=1e-5)
    assert metrics.confusion is not None
    assert np.array_equal(metrics.confusion.view(classes, classes).numpy(), confusion)
    assert metrics.summary() == {
        "top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss, "images": images,
        "not_finite": 0,
    }  # fmt: skip


def test_logits_that_are_not_finite_are_wrong_answers() -> None:
    logits = torch.tensor([[5.0, 0, 0], [float("nan"), 9, 0], [0, float("inf"), 0], [0, 0, 1]])
    metrics = ClassificationMetrics(3, CPU)
    metrics.add(logits, torch.tensor([0, 1, 1, -1]))
    assert (metrics.num_images, metrics.top1, metrics.not_finite) == (3, 1 / 3, 2)
    assert metrics.top5 == 1 / 3
    assert np.isfinite(metrics.loss)
    assert int(metrics.confusion.sum()) == 1  # type: ignore[union-attr]


def test_nothing_counted_is_nothing() -> None:
    metrics = ClassificationMetrics(3, CPU)
    metrics.add(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert metrics.summary() == {"top1": 0, "top5": 0, "loss": 0, "images": 0, "not_finite": 0}


def test_the_report(tmp_path: Path) -> None:
    classes = ["cat", 'a "dog", big', "never seen"]
    metrics = ClassificationMetrics(3, CPU)
    metrics.add(torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 1, 1, 1]))
    assert write_report(tmp_path / "new", metrics, classes) == []
    assert all(path.is_file() for path in report_files(tmp_path / "new"))
    with (tmp_path / "new" / "per_class.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "images", "correct", "top1", "top5"]
    assert rows[1:] == [
        ["cat", "1", "1", "1.0", "1.0"],
        ['a "dog", big', "3", "1", str(1 / 3), "1.0"],
        ["never seen", "0", "0", "", ""],
    ]
    with (tmp_path / "new" / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true \\ answered", *classes]
    assert rows[1:] == [["cat", "1", "0", "0"], [classes[1], "1", "1", "1"], [classes[2], *"000"]]


@pytest.mark.parametrize("classes", [2, 20, 61, 300])
def test_pictures_of_any_number_of_classes(classes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    confusion = np.random.default_rng(0).integers(0, 9, (classes, classes))
    names = [f"class $x_{k}^ of {{braces}} and more words" for k in range(classes)]
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        assert save_confusion(confusion, names, path) is None
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("L")).std() > 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_line_by_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = {"top-1": [0.2, 0.5, 0.4], "top-5": [0.5, 0.9, 0.8]}
    assert save_layers(["block 1", "block 2", "output"], layers, "x", tmp_path / "l.png") is None
    with Image.open(tmp_path / "l.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_without_matplotlib_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    metrics = ClassificationMetrics(2, CPU)
    assert write_report(tmp_path, metrics, "ab") == [
        "no picture: pip install 'simmim[plots]' draws one"
    ]
    assert not (tmp_path / "confusion.png").exists()
    assert (tmp_path / "confusion.csv").exists()


def test_too_many_classes_have_no_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MOST_CONFUSED_CLASSES", 4)
    metrics = ClassificationMetrics(5, CPU)
    metrics.add(torch.eye(5), torch.arange(5))
    assert metrics.top1 == 1.0
    assert write_report(tmp_path, metrics, "abcde") == [
        "no confusion matrix: 5 classes, more than 4"
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["per_class.csv"]
