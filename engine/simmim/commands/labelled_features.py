"""What `simmim probe` and `simmim knn` share: two labelled sets, and their features in memory."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simmim.commands.arguments import add_compute, add_data, pick_world, positive, progress
from simmim.data.labels import Labels
from simmim.data.names import printable
from simmim.data.splits import LabelledImages, SettingNames, open_labelled_sets
from simmim.downstream.evaluate import evaluation_view
from simmim.downstream.features import (
    bytes_of,
    extract_features,
    feature_shapes,
    load_for_features,
    pick_layers,
)
from simmim.errors import DataError
from simmim.model.image_model import ImageModel

GIB = 2**30

FLAGS = SettingNames(
    labels="--labels FILE", num_held_out="--holdout", validation="--val or --holdout N"
)

DATA_EPILOGUE = """\
SOURCE is a folder with a folder of images per class, labelled shards, a packed folder, or any
images with --labels; one with train and val in it means those two. Images are seen as in
evaluation, not augmented: their features are computed once and kept in memory.
"""


def add_sets(parser: argparse.ArgumentParser, layers: str) -> None:
    """Flags of the two sets, of the model, and of what is written; `layers` is their default."""
    add = parser.add_argument
    add("checkpoint", help="any checkpoint: run or checkpoint folder, or weights file")
    add("--train", required=True, metavar="SOURCE", help="labelled images to learn from")
    add("--val", default="", metavar="SOURCE", help="labelled images to answer for")
    add("--val-labels", default="", metavar="FILE", help="label file of --val")
    add(
        "--holdout",
        type=positive,
        metavar="N",
        help="without --val: training images to hold out for it, by class (default: a tenth)",
    )
    add(
        "--fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="share of every class of the training images (default: all)",
    )
    add("--seed", type=int, default=0, help="of every draw (default: %(default)s)")
    add(
        "--layers",
        default=layers,
        help='numbers of blocks, "output", or "all": 6,8,output (default: %(default)s)',
    )
    add_view(parser)
    add(
        "--memory-gib",
        type=float,
        default=8.0,
        metavar="GIB",
        help="memory for features; kept in float16 where float32 is more (default: %(default)g)",
    )
    add("--output", type=Path, metavar="FOLDER", help="write results there (default: only print)")
    add("--overwrite", action="store_true", help="replace the results that are in FOLDER")
    add_data(parser, labelled=True)
    add_compute(parser)


def add_view(parser: argparse.ArgumentParser) -> None:
    """Flags of how images become the model's inputs."""
    add = parser.add_argument
    add(
        "--image-size",
        type=positive,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width (default: the checkpoint's)",
    )
    add(
        "--margin",
        type=float,
        help="scale images to cover this times the view, then crop (default: the model's, 256/224)",
    )


def image_size(given: argparse.Namespace) -> Sequence[int] | int | None:
    """What --image-size asks for.

    Raises:
        ValueError: more than two numbers.
    """
    sides: list[int] | None = given.image_size
    if sides is not None and len(sides) > 2:
        raise ValueError("--image-size takes one or two numbers")
    return sides[0] if sides is not None and len(sides) == 1 else sides


def check_output(folder: Path | None, files: Sequence[str], overwrite: bool) -> None:
    """Raise ValueError where results of an earlier call would be replaced unasked."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --output")
    existing = [name for name in files if (folder / name).exists()]
    if existing and not overwrite:
        raise ValueError(
            f"{folder / existing[0]} exists; choose another --output or add --overwrite"
        )


def open_sets(given: argparse.Namespace) -> tuple[LabelledImages, LabelledImages]:
    """The training and validation images that the flags of `add_sets` mean.

    Raises:
        DataError: no images, no labels, classes that differ, or an empty set.
        ValueError: flags that contradict one another.
    """
    if given.val and given.holdout:
        raise ValueError("--holdout makes validation images of --train: leave out --val")
    if given.val_labels and not given.val:
        raise ValueError("--val-labels is the label file of --val; there is none")
    if (given.classes or given.first_number is not None) and not (given.labels or given.val_labels):
        raise ValueError("--classes and --first-number explain a label file; there is none")
    if not 0 < given.fraction <= 1:
        raise ValueError(f"--fraction={given.fraction}: choose a share above 0 and up to 1")
    return open_labelled_sets(
        given.train,
        seed=given.seed,
        val_path=given.val,
        num_held_out=given.holdout or 0,
        fraction=given.fraction,
        labels=str(given.labels or ""),
        val_labels=given.val_labels,
        classes=str(given.classes or ""),
        first_number=given.first_number,
        names=FLAGS,
    )


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of two labelled sets.

    Attributes:
        device: where to compute with them.
        layers: names of the layers.
        train: name of a layer → features of the training images, on the CPU.
        train_labels: their classes.
        val: the same of the validation images.
        val_labels: their classes.
        about: for the results: where model and images come from, and how many there are.
    """

    device: torch.device
    layers: list[str]
    train: dict[str, torch.Tensor]
    train_labels: Labels
    val: dict[str, torch.Tensor]
    val_labels: Labels
    about: dict[str, Any]


def prepare(given: argparse.Namespace, results: Sequence[str]) -> LabelledFeatures:
    """Open the model and the two sets that the flags of `add_sets` mean, and compute features.

    Args:
        given: the flags.
        results: names of the files that will be written to --output.

    Raises:
        DataError: see `open_sets` and `take_features`.
        RunError: see `take_features`.
        ValueError: results exist, there is no such device, model or layer, or see `take_features`.
    """
    device = pick_world(given.device).device
    check_output(given.output, results, given.overwrite)
    sets = open_sets(given)
    model = load_for_features(given.checkpoint, image_size(given)).to(device)
    layers = pick_layers(model, given.layers)
    (train, train_labels), (val, val_labels) = take_features(given, model, sets, layers)
    about = {
        "checkpoint": str(given.checkpoint),
        "train": {"source": sets[0].name, "images": len(train_labels.values)},
        "val": {"source": sets[1].name, "images": len(val_labels.values)},
        "classes": len(train_labels.classes),
        "pool": "mean",
    }
    return LabelledFeatures(device, layers, train, train_labels, val, val_labels, about)


def take_features(
    given: argparse.Namespace,
    model: ImageModel,
    sets: Sequence[LabelledImages],
    layers: Sequence[str],
) -> list[tuple[dict[str, torch.Tensor], Labels]]:
    """Features and labels of the readable images of each set.

    Raises:
        DataError: none of the images of a set can be read.
        RunError: features are not finite.
        ValueError: they take more memory than --memory-gib.
    """
    counts = [len(part.labels.values) for part in sets]
    dtype = _choose_dtype(given, bytes_of(feature_shapes(model, layers), torch.float32), counts)
    view = evaluation_view(model, margin=given.margin, value_range=given.value_range)
    taken = []
    with progress("encoded", sum(counts)) as bar:
        for part in sets:
            try:
                features = extract_features(
                    model,
                    part.source,
                    dtype=dtype,
                    layers=layers,
                    batch_size=given.batch_size,
                    view=view,
                    workers=given.workers,
                    precision=given.precision,
                    report=note,
                    advance=lambda count: bar.advance(bar.task_ids[0], count),
                )
            except DataError as error:
                raise DataError(f"{part.name}: {error}") from None
            labels = Labels(part.labels.values[features.ids], part.labels.classes)
            taken.append((features.layers, labels))
    return taken


def note(line: str) -> None:
    """Tell something beside the results."""
    print(f"simmim: {printable(line)}", file=sys.stderr)


def _choose_dtype(
    given: argparse.Namespace, bytes_per_image: int, counts: Sequence[int]
) -> torch.dtype:
    needed = bytes_per_image * sum(counts) / GIB
    budget = given.memory_gib
    if needed <= budget:
        note(f"features of {sum(counts):,} images: {_size(needed)} of memory")
        return torch.float32
    if needed / 2 <= budget:
        note(f"features of {sum(counts):,} images: {_size(needed / 2)} of memory, in float16")
        return torch.float16
    message = (
        f"features of {sum(counts):,} images take {_size(needed / 2)} in float16, more than "
        f"--memory-gib={budget:g}: choose fewer --layers, allow more"
    )
    # what is validated on is needed whole
    share = (2 * budget * GIB / bytes_per_image - sum(counts[1:])) / counts[0] * given.fraction
    if share >= 0.001:
        message += f", or take --fraction={math.floor(1000 * share) / 1000:g}"
    raise ValueError(message)


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
