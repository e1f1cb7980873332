"""The `simmim evaluate` command: its arguments, and what it prints and writes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from simmim.commands.arguments import (
    add_compute,
    add_data,
    open_labelled,
    pick_world,
    progress,
)
from simmim.commands.errors import one_line_errors
from simmim.commands.labelled_features import check_output, note
from simmim.data.labels import Labels
from simmim.data.names import printable
from simmim.downstream.evaluate import evaluate, evaluation_view, load_classifier, match_to_model
from simmim.downstream.metrics import REPORT_FILES, ClassificationMetrics, write_report
from simmim.errors import DataError

# Classes in the printed table: the worst of more.
SHOWN_CLASSES = 20

DESCRIPTION = "Loss and accuracy of a fine-tuned model on labelled images, over all and by class."

EPILOGUE = """\
SOURCE is a folder with a folder of images per class, labelled shards, a packed folder, or any
images with --labels. Classes are matched to the model's by name.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim evaluate`."""
    made = argparse.ArgumentParser(
        prog="simmim evaluate",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("checkpoint", help="fine-tuning run (its best weights), checkpoint folder or weights file")
    add("source", metavar="SOURCE", help="labelled images, see below")
    add(
        "--output", type=Path, metavar="FOLDER", help="write the report there (default: only print)"
    )
    add("--overwrite", action="store_true", help="replace the report that is in FOLDER")
    add(
        "--margin",
        type=float,
        help="scale images to cover this times the view, then crop (default: the model's)",
    )
    add_data(made, labelled=True)
    add_compute(made)
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 the machine, 2 wrong input)."""
    given = parser().parse_args(arguments)
    world = pick_world(given.device)
    check_output(given.output, REPORT_FILES, given.overwrite)
    model = load_classifier(given.checkpoint).to(world.device)
    source, labels = open_labelled(given.source, given)
    try:
        labels = match_to_model(labels, model)
        with progress("evaluated", int((labels.values >= 0).sum())) as bar:
            metrics = evaluate(
                model,
                source,
                labels,
                world,
                batch_size=given.batch_size,
                view=evaluation_view(
                    model,
                    margin=given.margin,
                    value_range=given.value_range,
                ),
                workers=given.workers,
                precision=given.precision,
                report=note,
                advance=lambda count: bar.advance(bar.task_ids[0], count),
            )
    except DataError as error:
        raise DataError(f"{given.source}: {error}") from None
    _print(metrics, labels, model.classes)
    if given.output is not None:
        for line in write_report(given.output, metrics, model.classes):
            note(line)
        print(given.output)
    return 0


def _print(metrics: ClassificationMetrics, labels: Labels, classes: Sequence[str]) -> None:
    skipped = int((labels.values < 0).sum())
    also = f", {skipped:,} without a label skipped" if skipped else ""
    print(
        f"top-1 {metrics.top1:.2%}  top-5 {metrics.top5:.2%}  loss {metrics.loss:.4f}  "
        f"on {metrics.num_images:,} images{also}"
    )
    if metrics.not_finite:
        print(f"{metrics.not_finite:,} answers are not finite, and wrong; see --precision")
    counts = [
        (right / images, images, right, top5, name)
        for name, images, right, top5 in zip(classes, *metrics.counts.cpu().tolist())
        if images
    ]
    table = Table("class", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for heading in ("images", "correct", "top-1", "top-5"):
        table.add_column(heading, justify="right")
    listed = counts if len(counts) <= SHOWN_CLASSES else sorted(counts)[:SHOWN_CLASSES]
    for accuracy, images, right, top5, name in listed:
        table.add_row(
            Text(printable(name)),
            f"{images:,}",
            f"{right:,}",
            f"{accuracy:.2%}",
            f"{top5 / images:.2%}",
        )
    if len(listed) < len(counts):
        print(f"the {len(listed)} worst of {len(counts):,} classes (--output writes all):")
    Console(highlight=False).print(table)
