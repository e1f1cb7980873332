"""The `simmim features` command."""

import argparse
from pathlib import Path

from simmim.commands.arguments import (
    add_compute,
    add_data,
    pick_world,
    progress,
)
from simmim.commands.errors import one_line_errors
from simmim.commands.labelled_features import add_view, image_size, note
from simmim.data.labels import labels_of
from simmim.data.open import open_source
from simmim.downstream.evaluate import evaluation_view
from simmim.downstream.feature_files import DTYPES, feature_files, write_features
from simmim.downstream.features import POOLS, load_for_features, pick_layers
from simmim.errors import DataError

DESCRIPTION = "Features of every image of a source, to a file. Nothing is masked or augmented."

EPILOGUE = """\
SOURCE is a folder of images, shards, or a packed folder. OUT tells the format by its suffix:
  .safetensors  ids, labels where known (-1: none), and features [N, D] (all layers: one per layer)
  .npy          features [N, D] of one layer
  .parquet      columns id, name, label where known, and feature (all layers: one per layer)
An id is the image's number in the sorted SOURCE. Beside arrays, OUT.csv has the row, id, name and
label of every image. Images that cannot be read are named and left out.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim features`."""
    made = argparse.ArgumentParser(
        prog="simmim features",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("checkpoint", help="any checkpoint: run or checkpoint folder, or weights file")
    add("source", metavar="SOURCE", help="images, see below")
    add("out", type=Path, metavar="OUT", help="file to write, see below")
    add(
        "--layer",
        default="output",
        help='number of a block, several (6,8), "output", or "all" (default: %(default)s)',
    )
    add(
        "--pool",
        choices=POOLS,
        default="mean",
        help="mean of the patch tokens (default), the class token, or none: every patch token",
    )
    add("--dtype", choices=tuple(DTYPES), default="float32", help="in OUT (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    add_view(made)
    add_data(made, labelled=True)
    add_compute(made)
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 the machine, 2 wrong input)."""
    given = parser().parse_args(arguments)
    existing = [path for path in feature_files(given.out) if path.exists()]
    if existing and not given.overwrite:
        raise ValueError(f"{existing[0]} exists; choose another OUT or add --overwrite")
    world = pick_world(given.device)
    source = open_source(given.source)
    labels = labels_of(
        source,
        given.labels,
        class_file=given.classes,
        first_number=given.first_number,
        partial=True,
    )
    model = load_for_features(given.checkpoint, image_size(given)).to(world.device)
    layers = pick_layers(model, given.layer)
    try:
        with progress("encoded", len(source.names)) as bar:
            count = write_features(
                given.out,
                model,
                source,
                labels,
                dtype=given.dtype,
                layers=layers,
                pool=given.pool,
                batch_size=given.batch_size,
                view=evaluation_view(
                    model,
                    margin=given.margin,
                    value_range=given.value_range,
                ),
                workers=given.workers,
                precision=given.precision,
                report=note,
                advance=lambda done: bar.advance(bar.task_ids[0], done),
            )
    except DataError as error:
        raise DataError(f"{given.source}: {error}") from None
    left_out = len(source.names) - count
    also = f", {left_out:,} left out" if left_out else ""
    what = layers[0] if len(layers) == 1 else f"{len(layers)} layers"
    print(f"{given.out}: {what} of {count:,} images{also}")
    return 0
