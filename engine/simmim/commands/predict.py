"""The `simmim predict` command: its arguments, and answers as a table or as JSON."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from simmim.commands.arguments import (
    add_compute,
    add_data,
    pick_world,
    positive,
    progress,
)
from simmim.commands.errors import one_line_errors
from simmim.data.names import printable
from simmim.data.source import Source
from simmim.downstream.evaluate import load_classifier
from simmim.downstream.predict import Prediction, classify, open_images

# Up to so many images are decoded in this process: starting others would take longer.
FEW_IMAGES = 64

DESCRIPTION = "Classes of photos, by a fine-tuned model."

EPILOGUE = """\
IMAGE is an image file, a folder of images, or shards. An image that cannot be read is reported, the
others are classified, and the exit code is then 1.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim predict`."""
    made = argparse.ArgumentParser(
        prog="simmim predict",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("checkpoint", help="fine-tuning run (its best weights), checkpoint folder or weights file")
    add("images", nargs="+", metavar="IMAGE", help="photos, see below")
    add("--top-k", type=positive, default=5, metavar="N", help="answers (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object per image and line")
    add_data(made, labelled=False)
    add_compute(made)
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 an image or the machine, 2 wrong input)."""
    given = parser().parse_args(arguments)
    world = pick_world(given.device)
    source = open_images(given.images)
    model = load_classifier(given.checkpoint).to(world.device)
    few = given.workers < 0 and len(source.names) <= FEW_IMAGES
    answers = classify(
        model,
        source,
        top_k=given.top_k,
        batch_size=given.batch_size,
        workers=0 if few else given.workers,
        precision=given.precision,
        value_range=given.value_range,
    )
    failed = (_print_json if given.json else _print_table)(source, answers)
    if failed:
        print(
            f"simmim: error: {failed} of {len(source.names)} images could not be classified",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _print_json(source: Source, answers: Iterator[tuple[int, list[Prediction] | str]]) -> int:
    failed = 0
    for sample, answer in answers:
        row: dict[str, object] = {"image": _valid(source.names[sample])}
        if isinstance(answer, str):
            failed += 1
            row["error"] = _valid(answer)
        else:
            row["predictions"] = [
                asdict(prediction) | {"label": _valid(prediction.label)} for prediction in answer
            ]
        print(json.dumps(row))
    return failed


def _print_table(source: Source, answers: Iterator[tuple[int, list[Prediction] | str]]) -> int:
    failed = 0
    table = Table("image", "class", box=None, pad_edge=False)
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    table.add_column("probability", justify="right")
    with progress("classified", len(source.names)) as bar:
        for sample, answer in answers:
            bar.advance(bar.task_ids[0])
            name = printable(source.names[sample])
            if isinstance(answer, str):
                failed += 1
                bar.console.print(
                    Text(f"simmim: error: {name}: {printable(answer)}"), soft_wrap=True
                )
                continue
            for prediction in answer:
                table.add_row(
                    Text(name), Text(printable(prediction.label)), f"{prediction.probability:.4f}"
                )
                name = ""
    if table.row_count:
        Console(highlight=False).print(table)
    return failed


def _valid(text: str) -> str:
    # bytes of a file name that are no UTF-8 are lone surrogates here, which no JSON reader takes
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
