"""Accuracy, counted without reading back: against a loop by hand, and what is written of it."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.data.labels import Labels
from simmim.distributed import World
from simmim.downstream import metrics as module
from simmim.downstream.metrics import (
    REPORT_FILES,
    ClassificationMetrics,
    label_tensor,
    write_report,
)

CPU = torch.device("cpu")


def draw(images: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right rather often, and labels of which some are unknown."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    rows = torch.arange(images)
    logits[rows, label] += 1.5 * (label >= 0)
    return logits, label


def count(logits: Tensor, label: Tensor, batch: int = 64) -> ClassificationMetrics:
    found = ClassificationMetrics(logits.shape[1], CPU)
    for part, labels in zip(logits.split(batch), label.split(batch)):
        found.add(part, labels)
    return found


def by_hand(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """(images, right, right among five) by class, the confusion matrix, and every loss."""
    K = logits.shape[1]
    counts = torch.zeros(3, K, dtype=torch.int64)
    confusion = torch.zeros(K, K, dtype=torch.int64)
    losses = []
    for row, true in zip(logits.double().tolist(), label.tolist()):
        if true < 0:
            continue
        counts[0, true] += 1
        if not np.isfinite(row).all():
            continue
        order = sorted(range(K), key=lambda k: -row[k])
        counts[1, true] += order[0] == true
        counts[2, true] += true in order[:5]
        confusion[true, order[0]] += 1
        losses.append(float(np.log(np.exp(row).sum()) - row[true]))
    return counts, confusion, losses


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 6, 30])
def test_counts_of_a_loop_by_hand(classes: int) -> None:
    logits, label = draw(300, classes)
    for row, value in ((3, torch.nan), (50, torch.inf), (51, -torch.inf)):
        logits[row, row % classes] = value
        label[row] = row % classes
    found = count(logits, label)
    counts, confusion, losses = by_hand(logits, label)
    assert torch.equal(found.counts, counts)
    assert found.confusion is not None
    assert torch.equal(found.confusion.view(classes, classes), confusion)
    assert int(confusion.sum()) == found.num_images - 3
    assert found.not_finite == 3
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6, abs=1e-9)
    images = int((label >= 0).sum())
    assert 0 < images == found.num_images < 300
    assert found.top1 == int(counts[1].sum()) / images
    assert found.top5 == int(counts[2].sum()) / images
    if classes <= 5:
        assert found.top5 == (images - 3) / images  # one of five is always right
    else:
        assert found.top1 < found.top5 < 1
    assert found.summary() == {
        "top1": found.top1,
        "top5": found.top5,
        "loss": found.loss,
        "images": images,
        "not_finite": 3,
    }


def test_batches_make_no_difference() -> None:
    logits, label = draw(200, 9)
    whole, parts = count(logits, label, 200), count(logits, label, 7)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    parts.add(logits[:0], label[:0])  # an empty batch is none
    assert torch.equal(whole.counts, parts.counts)
    # 16-bit logits count as the numbers that they are
    half = logits.bfloat16()
    assert torch.equal(count(half, label).counts, count(half.float(), label).counts)


def test_nothing_counted_is_zero() -> None:
    found = count(torch.randn(4, 3), torch.full((4,), -1))
    found.add(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert found.summary() == {"top1": 0, "top5": 0, "loss": 0, "images": 0, "not_finite": 0}


class Unread(TorchDispatchMode):
    """Fails where a value of a tensor is read by the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, func
        assert func.overloadpacket is not torch.ops.aten.nonzero, func
        return func(*args, **(kwargs or {}))


def test_adding_reads_nothing_back() -> None:
    logits, label = draw(20, 6)
    found = ClassificationMetrics(6, CPU)
    with Unread():
        found.add(logits, label)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            _ = found.top1
    assert found.num_images > 0


def test_merging_adds_all_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, label = draw(120, 7)
    logits[[5, 100], 2] = torch.nan
    label[[5, 100]] = 3
    whole = count(logits, label)
    first, second = count(logits[:50], label[:50]), count(logits[50:], label[50:])
    others = [t.clone() for t in (second.counts, second.sums, second.confusion) if t is not None]
    world = World(0, 2, CPU)

    def add(tensor: Tensor, given: World) -> Tensor:
        assert given is world
        return tensor.add_(others.pop(0))

    monkeypatch.setattr(module, "all_reduce_sum", add)
    first.merge(world)
    assert not others
    assert torch.equal(first.counts, whole.counts)
    assert first.confusion is not None
    assert whole.confusion is not None
    assert torch.equal(first.confusion, whole.confusion)
    assert (first.not_finite, whole.not_finite) == (2, 2)
    assert first.loss == pytest.approx(whole.loss, rel=1e-6)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def small() -> ClassificationMetrics:
    """Class 0: two right, one for class 2; class 1: none; class 2: one right, one not finite."""
    found = ClassificationMetrics(3, CPU)
    logits = torch.eye(3)[[0, 0, 2, 2, 1]]
    logits[4] = torch.nan
    found.add(logits, torch.tensor([0, 0, 0, 2, 2]))
    return found


def test_written_tables(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    names = ("tench, Tinca", 'a "hen"', "é")
    write_report(folder, small(), names)
    assert rows(folder / "per_class.csv") == [
        ["class", "images", "correct", "top1", "top5"],
        ["tench, Tinca", "3", "2", str(2 / 3), "1.0"],
        ['a "hen"', "0", "0", "", ""],
        ["é", "2", "1", "0.5", "0.5"],
    ]
    assert rows(folder / "confusion.csv") == [
        ["true \\ answered", *names],
        ["tench, Tinca", "2", "0", "1"],
        ['a "hen"', "0", "0", "0"],
        ["é", "0", "0", "1"],
    ]
    assert {folder / name for name in REPORT_FILES if (folder / name).exists()} == set(
        folder.iterdir()
    )


def test_a_picture_that_is_not_drawn_leaves_no_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "confusion.png"
    picture.write_bytes(b"of an earlier evaluation")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    notes = write_report(tmp_path, small(), "abc")
    assert notes == ["no picture: pip install 'simmim[plots]' draws one"]
    assert not picture.exists()
    assert (tmp_path / "confusion.csv").exists()


def test_too_many_classes_for_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CONFUSED_CLASSES", 5)
    for name in ("confusion.csv", "confusion.png"):
        (tmp_path / name).write_text("of an earlier evaluation")
    logits, label = draw(90, 6)
    found = count(logits, label)
    assert found.confusion is None
    assert torch.equal(found.counts, by_hand(logits, label)[0])
    found.merge(World(0, 1, CPU))
    notes = write_report(tmp_path, found, "abcdef")
    assert notes == ["no confusion matrix: 6 classes, more than 5"]
    assert [path.name for path in tmp_path.iterdir()] == ["per_class.csv"]


def test_a_whole_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert write_report(tmp_path, small(), "abc") == []
    assert all((tmp_path / name).is_file() for name in REPORT_FILES)


def test_rows_are_true_classes_and_columns_answers() -> None:
    found = ClassificationMetrics(3, CPU)
    # class 0 is answered by 2 twice, class 2 by 1 once
    found.add(torch.eye(3)[[2, 2, 1]], torch.tensor([0, 0, 2]))
    assert found.confusion is not None
    assert found.confusion.view(3, 3).tolist() == [[0, 0, 2], [0, 0, 0], [0, 1, 0]]


def test_the_picture_gets_rows_of_true_classes_and_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(module, "save_confusion", lambda *arguments: given.append(arguments))
    assert write_report(tmp_path, small(), "abc") == []
    ((confusion, images, classes, path),) = given
    assert confusion.tolist() == [[2, 0, 1], [0, 0, 0], [0, 0, 1]]
    # one image of the last class got no answer
    assert images.tolist() == [3, 0, 2]
    assert (classes, path) == ("abc", tmp_path / "confusion.png")


def test_right_answers_and_right_ones_of_five_stand_in_their_columns(tmp_path: Path) -> None:
    found = ClassificationMetrics(7, CPU)
    # of four images of class 6: first, second, fifth and sixth
    order = torch.tensor([[6, 0, 1, 2, 3, 4, 5], [0, 6, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 4, 5],
                          [0, 1, 2, 3, 4, 6, 5]])  # fmt: skip
    logits = torch.zeros(4, 7).scatter_(1, order, torch.arange(7.0, 0, -1).expand(4, 7))
    found.add(logits, torch.full((4,), 6))
    assert found.counts[:, 6].tolist() == [4, 1, 3]
    assert (found.top1, found.top5) == (0.25, 0.75)
    write_report(tmp_path, found, "abcdefg")
    assert rows(tmp_path / "per_class.csv")[7] == ["g", "4", "1", "0.25", "0.75"]


def test_labels_are_numbers_by_image() -> None:
    labels = Labels(np.array([2, -1, 0]), ("a", "b", "c"))
    found = label_tensor(labels, CPU)
    assert (found.dtype, found.tolist()) == (torch.int64, [2, -1, 0])
    assert module.MOST_CONFUSED_CLASSES == 4096
    assert ClassificationMetrics(4096, torch.device("meta")).confusion is not None
    assert ClassificationMetrics(4097, torch.device("meta")).confusion is None
