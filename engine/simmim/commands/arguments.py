"""What several commands take: a data set and its labels, and where to run."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.distributed import World
from simmim.errors import DataError
from simmim.training import precision


def add_data(parser: argparse.ArgumentParser, *, labelled: bool) -> None:
    """Flags of reading images: --labels, --classes and --first-number only where `labelled`."""
    add = parser.add_argument
    if labelled:
        add(
            "--labels",
            type=Path,
            metavar="FILE",
            help="label file (default: the source's own labels, else class folders)",
        )
        add("--classes", type=Path, metavar="FILE", help="names of a label file's classes")
        add(
            "--first-number",
            type=int,
            metavar="N",
            help="what the label file calls the first class: 0 or 1",
        )
    add("--workers", type=int, default=-1, metavar="N", help="decoding processes (default: auto)")
    add_value_range(parser)


def add_value_range(parser: argparse.ArgumentParser) -> None:
    """The flag --value-range; what it gives is a tuple, or None."""
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        action=_Rising,
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 255 where files hold other than 8 bits",
    )


class _Rising(argparse.Action):
    """Stores two numbers of which the first is the smaller, as a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        low, high = values
        if not low < high:
            parser.error(f"{option_string} LOW HIGH: LOW must be less than HIGH")
        setattr(namespace, self.dest, (low, high))


def add_compute(parser: argparse.ArgumentParser, batch_size: int = 64) -> None:
    """Flags of where and how a model runs."""
    add = parser.add_argument
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes CUDA where there is a device (default)",
    )
    add(
        "--precision",
        choices=tuple(precision.DTYPES),
        default="float32",
        help="compute type (default: %(default)s)",
    )
    add("--batch-size", type=positive, default=batch_size, help="default: %(default)s")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def pick_world(device: str) -> World:
    """This process, alone, on the device that `--device` means.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but torch sees no CUDA device; see `simmim doctor`")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    return World(0, 1, torch.device("cuda", 0) if use_cuda else torch.device("cpu"))


def open_labelled(path: str, options: argparse.Namespace) -> tuple[Source, Labels]:
    """The images of `path` and their labels, as the flags of `add_data` say.

    Raises:
        DataError: no images, or nothing that tells their classes.
    """
    source = open_source(path)
    labels = labels_of(
        source, options.labels, class_file=options.classes, first_number=options.first_number
    )
    if labels is None:
        raise DataError(
            f"{path}: nothing tells the classes of its images: put them into a folder per class, "
            "or give --labels FILE"
        )
    return source, labels


def progress(what: str, total: int) -> Progress:
    """A progress bar on the terminal's error stream, with one task; silent elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    bar.add_task(what, total=total)
    return bar
