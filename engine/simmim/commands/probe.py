"""The `simmim probe` command: which layer is best for a linear classifier."""

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simmim.commands.arguments import positive, progress
from simmim.commands.errors import one_line_errors
from simmim.commands.labelled_features import (
    DATA_EPILOGUE,
    add_sets,
    note,
    prepare,
)
from simmim.downstream.plots import save_layers
from simmim.downstream.probe import RATES, Probed, Training, best_layer, probe_layers
from simmim.files import write_text

JSON_FILE, CSV_FILE, PICTURE_FILE = "probe.json", "probe.csv", "probe.png"

DESCRIPTION = """\
Train a linear classifier on the frozen features of every layer: the mean of its patch tokens,
standardised. The middle of a SimMIM encoder does better than its output.
"""

EPILOGUE = f"""\
{DATA_EPILOGUE}
Every layer trains with all --rates; the one that does best on a tenth of the training images is
taken, to train on all of them. The validation images decide nothing but which layer is named.
FOLDER gets {JSON_FILE}, {CSV_FILE} and {PICTURE_FILE}.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim probe`."""
    made = argparse.ArgumentParser(
        prog="simmim probe",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sets(made, layers="all")
    add = made.add_argument
    add(
        "--rates",
        type=_rates,
        default=RATES,
        metavar="LR,…",
        help=f"learning rates to choose from (default: {','.join(f'{r:g}' for r in RATES)})",
    )
    add("--epochs", type=positive, default=100, help="of a classifier (default: %(default)s)")
    add(
        "--sgd-batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="images of a classifier's step (default: %(default)s)",
    )
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 the machine, 2 wrong input)."""
    given = parser().parse_args(arguments)
    training = Training(given.rates, given.epochs, given.sgd_batch_size, given.seed)
    features = prepare(given, (JSON_FILE, CSV_FILE, PICTURE_FILE))
    results = []
    with progress("probed", len(features.layers)) as bar:
        for result in probe_layers(
            features.train,
            features.train_labels,
            features.val,
            features.val_labels,
            training,
            device=features.device,
        ):
            results.append(result)
            bar.advance(bar.task_ids[0])
    about = {**features.about, **asdict(training)}
    _print(results, about)
    if at_end := [r.layer for r in results if r.picked and r.rate == max(given.rates)]:
        note(f"the highest rate was best for {', '.join(at_end)}: higher --rates may do better")
    if at_end := [r.layer for r in results if r.picked and r.rate == min(given.rates)]:
        note(f"the lowest rate was best for {', '.join(at_end)}: lower --rates may do better")
    if given.output is not None:
        _write(given.output, results, about)
        print(given.output)
    return 0


def _print(results: Sequence[Probed], about: dict[str, Any]) -> None:
    print(
        f"linear probe of {about['classes']:,} classes: trained on {about['train']['images']:,} "
        f"images, validated on {about['val']['images']:,}"
    )
    table = Table("layer", box=None, pad_edge=False)
    for heading in ("lr", "top-1", "top-5"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.layer,
            f"{result.rate:g}",
            f"{result.score.top1:.2%}",
            f"{result.score.top5:.2%}",
        )
    Console(highlight=False).print(table)
    best = best_layer(results)
    print(f"best: {best.layer}, top-1 {best.score.top1:.2%}")


def _write(folder: Path, results: Sequence[Probed], about: dict[str, Any]) -> None:
    rows = [
        {
            "layer": r.layer,
            "rate": r.rate,
            "top1": r.score.top1,
            "top5": r.score.top5,
            # JSON has no infinity
            "loss": r.score.loss if math.isfinite(r.score.loss) else None,
            "picked_top1": r.picked,
        }
        for r in results
    ]
    content = {**about, "best": best_layer(results).layer, "layers": rows}
    write_text(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "rate", "top1", "top5", "loss"])
    writer.writerows([r.layer, r.rate, r.score.top1, r.score.top5, r.score.loss] for r in results)
    write_text(folder / CSV_FILE, text.getvalue())
    accuracies: dict[str, Sequence[float]] = {"top-1": [r.score.top1 for r in results]}
    if about["classes"] > 5:
        accuracies["top-5"] = [r.score.top5 for r in results]
    title = f"linear probe, {about['classes']:,} classes, best: {best_layer(results).layer}"
    if missing := save_layers([r.layer for r in results], accuracies, title, folder / PICTURE_FILE):
        note(missing)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return Training(tuple(float(part) for part in text.split(","))).rates
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers above 0") from None
