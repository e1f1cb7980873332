"""Counts how often a classifier is right, on the device, and reports it as tables and a picture.

B batch, K classes.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from simmim.data.labels import Labels
from simmim.distributed import World, all_reduce_sum
from simmim.downstream.plots import save_confusion
from simmim.files import write_text

# Above this many classes the confusion matrix (K² counts) is left out.
MOST_CONFUSED_CLASSES = 4096

PER_CLASS_FILE, CONFUSION_FILE, PICTURE_FILE = "per_class.csv", "confusion.csv", "confusion.png"

# The files that `write_report` writes.
REPORT_FILES = (PER_CLASS_FILE, CONFUSION_FILE, PICTURE_FILE)


class ClassificationMetrics:
    """Counts of right and wrong answers, kept on the device until they are asked for.

    Args:
        num_classes: K.
        device: where logits lie.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        # per class: images, answers that are right, answers of which one of five is right
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
        # summed loss, images whose logits are not finite
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.confusion: Tensor | None = None
        if num_classes <= MOST_CONFUSED_CLASSES:
            self.confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: [B, K]; a row that is not finite is a wrong answer.
            labels: int64 [B]; images with -1 are not counted.
        """
        counted = labels >= 0
        label = labels.clamp(min=0)
        logits = logits.float()
        finite = logits.isfinite().all(1)
        best = logits.topk(min(5, self.num_classes), dim=1).indices  # [B, 5]
        right = (best == label[:, None]) & (finite & counted)[:, None]
        for row, hit in enumerate((counted, right[:, 0], right.any(1))):
            self.counts[row].index_add_(0, label, hit.long())
        loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
        self.sums[0] += torch.where(finite & counted, loss, 0.0).double().sum()
        self.sums[1] += (counted & ~finite).sum()
        if self.confusion is not None:
            # a row that is not finite is no answer, and stands in no column
            place = label * self.num_classes + best[:, 0]
            self.confusion.index_add_(0, place, (finite & counted).long())

    def merge(self, world: World) -> None:
        """Sum the counts over all processes; each of them gets the sums."""
        for tensor in (self.counts, self.sums, self.confusion):
            if tensor is not None:
                all_reduce_sum(tensor, world)

    @property
    def num_images(self) -> int:
        """Images that were counted."""
        return int(self.counts[0].sum())

    @property
    def top1(self) -> float:
        """Share of images whose best class is right; 0 for none."""
        return int(self.counts[1].sum()) / max(1, self.num_images)

    @property
    def top5(self) -> float:
        """Share of images with the right class among the best five; 0 for none."""
        return int(self.counts[2].sum()) / max(1, self.num_images)

    @property
    def not_finite(self) -> int:
        """Images whose logits were not finite."""
        return int(self.sums[1])

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the images with finite logits; 0 for none."""
        return float(self.sums[0]) / max(1, self.num_images - self.not_finite)

    def summary(self) -> dict[str, float | int]:
        """The figures as plain values."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.num_images,
            "not_finite": self.not_finite,
        }


def write_report(folder: Path, metrics: ClassificationMetrics, classes: Sequence[str]) -> list[str]:
    """Write accuracy by class and the confusion matrix (rows true, columns answered).

    Images whose logits were not finite are in no column, so that a row may have a smaller sum than
    its class has images.

    Args:
        folder: made if needed; its files of the same names are replaced.
        metrics: what was counted.
        classes: their names.

    Returns:
        A line for everything that was left out, with the reason.

    Raises:
        OSError: a file cannot be written.
    """
    counts = metrics.counts.cpu().tolist()
    rows = [
        [name, images, right, right / images if images else "", top5 / images if images else ""]
        for name, images, right, top5 in zip(classes, *counts)
    ]
    _write_csv(folder / PER_CLASS_FILE, ["class", "images", "correct", "top1", "top5"], rows)
    # if no new picture can be drawn, an earlier one must not stay beside these tables
    (folder / PICTURE_FILE).unlink(missing_ok=True)
    if metrics.confusion is None:
        (folder / CONFUSION_FILE).unlink(missing_ok=True)
        return [
            f"no confusion matrix: {metrics.num_classes:,} classes, more than "
            f"{MOST_CONFUSED_CLASSES:,}"
        ]
    confusion = metrics.confusion.cpu().view(metrics.num_classes, -1)
    named = [[name, *row] for name, row in zip(classes, confusion.tolist())]
    _write_csv(folder / CONFUSION_FILE, ["true \\ answered", *classes], named)
    images = metrics.counts[0].cpu().numpy()
    note = save_confusion(confusion.numpy(), images, classes, folder / PICTURE_FILE)
    return [note] if note else []


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def label_tensor(labels: Labels, device: torch.device) -> Tensor:
    """Labels as a tensor, int64 [N]."""
    return torch.from_numpy(labels.values).to(device)
