"""The `simmim knn` command: nearest neighbours in feature space."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simmim.commands.arguments import progress
from simmim.commands.errors import one_line_errors
from simmim.commands.labelled_features import (
    DATA_EPILOGUE,
    add_sets,
    note,
    prepare,
)
from simmim.downstream.knn import NEIGHBOURS, TEMPERATURE, NeighbourScore, score_neighbours
from simmim.files import write_text

JSON_FILE = "knn.json"

DESCRIPTION = """\
Classify images by their nearest training images: cosine similarity s of the mean patch tokens, a
vote of exp(s / T) each.
"""

EPILOGUE = f"""\
{DATA_EPILOGUE}
Neighbours are no fair measure of a SimMIM encoder: nothing in its training draws images of a class
together. Fine-tuning, or `simmim probe` at its best layer, tells what it has learnt.
FOLDER gets {JSON_FILE}.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim knn`."""
    made = argparse.ArgumentParser(
        prog="simmim knn",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sets(made, layers="output")
    add = made.add_argument
    add(
        "--k",
        type=_neighbours,
        default=NEIGHBOURS,
        metavar="K,…",
        help=f"neighbours (default: {','.join(map(str, NEIGHBOURS))})",
    )
    add(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help="of the votes (default: %(default)s)",
    )
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 the machine, 2 wrong input)."""
    reader = parser()
    given = reader.parse_args(arguments)
    if not given.temperature > 0:
        reader.error("--temperature must be above 0")
    features = prepare(given, (JSON_FILE,))
    bank = len(features.train_labels.values)
    if clipped := [k for k in given.k if k > bank]:
        note(f"k={','.join(map(str, clipped))} is more than the {bank} training images: all vote")
    results = {}
    total = len(features.layers) * len(features.val_labels.values)
    with progress("compared", total) as bar:
        for layer in features.layers:
            results[layer] = score_neighbours(
                features.train[layer],
                features.train_labels.values,
                features.val[layer],
                features.val_labels.values,
                given.k,
                temperature=given.temperature,
                device=features.device,
                advance=lambda count: bar.advance(bar.task_ids[0], count),
            )
    about = {**features.about, "temperature": given.temperature}
    _print(results, about)
    if given.output is not None:
        _write(given.output, results, about)
        print(given.output)
    return 0


def _print(results: dict[str, list[NeighbourScore]], about: dict[str, Any]) -> None:
    print(
        f"nearest neighbours, {about['classes']:,} classes: {about['train']['images']:,} images "
        f"vote on {about['val']['images']:,}"
    )
    table = Table("layer", box=None, pad_edge=False)
    for heading in ("k", "top-1", "top-5"):
        table.add_column(heading, justify="right")
    for layer, scores in results.items():
        for score in scores:
            table.add_row(layer, f"{score.k:,}", f"{score.top1:.2%}", f"{score.top5:.2%}")
    Console(highlight=False).print(table)


def _write(folder: Path, results: dict[str, list[NeighbourScore]], about: dict[str, Any]) -> None:
    rows: Sequence[dict[str, Any]] = [
        {"layer": layer, **asdict(score)} for layer, scores in results.items() for score in scores
    ]
    write_text(folder / JSON_FILE, json.dumps({**about, "scores": rows}, indent=2) + "\n")


def _neighbours(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers of at least 1")
    return numbers
