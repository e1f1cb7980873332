"""What several commands take: a data set and its labels, where to run; and how their errors end."""

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.distributed import World
from simmim.errors import DataError, RunError
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
    add(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 255 where files hold other than 8 bits",
    )


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


def one_line_errors(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A command whose errors are one line: 2 for bad input, 1 for the machine's trouble."""

    @wraps(main)
    def run(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except (ValueError, DataError) as error:
            return _fail(str(error), 2)
        except RunError as error:
            return _fail(str(error), 1)
        except BrokenPipeError:
            raise  # whoever read the output has enough
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror or error}", 1)

    return run


def _fail(message: str, code: int) -> int:
    print(f"simmim: error: {message}", file=sys.stderr)
    return code
