"""The `simmim pack` command: its arguments, its progress, its summary."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simmim.commands.arguments import add_value_range
from simmim.commands.errors import end
from simmim.data.decode import MAX_PIXELS
from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.pack import pack
from simmim.packing.parquet import ParquetSource, parquet_files
from simmim.packing.plan import SKIPPED_FILE, Summary
from simmim.packing.statistics import pack_statistics, statistics
from simmim.packing.verify import verify
from simmim.training.log import duration

# Lines of `--verify` that are printed; the rest is counted.
MAX_PROBLEMS = 20

# Between two lines of progress where there is no terminal.
LINE_EVERY_S = 10.0

# Flags that act where shards are made, and where images are read.
OF_PACKING = ("short_side", "quality", "keep_originals", "images_per_shard", "labels", "shuffle")
OF_READING = ("max_pixels", "channels", "value_range")

DESCRIPTION = """\
Decode, check and downscale images once, into tar shards that train fast: plain tar, webdataset and
DALI read them too. The same command goes on where it was stopped.
"""

EPILOGUE = """\
SOURCE is a folder of images, a folder of .tar shards or one .tar, a packed folder, or Hugging
Face's parquet: a file, a folder, or a pattern in quotes.
JPEGs that are small enough and upright keep their bytes; others become JPEG (1 or 3 channels), PNG
(2 or 4) or .npy (more). Downscaling is Lanczos, antialiased.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim pack`."""
    made = argparse.ArgumentParser(
        prog="simmim pack",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("source", nargs="?", metavar="SOURCE", help="images, see below")
    add("folder", nargs="?", type=Path, metavar="DEST", help="folder to make or to go on with")
    add(
        "--short-side",
        type=_positive,
        metavar="PIXELS",
        help="downscale images whose shorter side is longer; never enlarges (default: 256)",
    )
    add("--quality", type=_quality, default=90, help="of JPEGs (default: %(default)s)")
    add("--keep-originals", action="store_true", help="keep every file's bytes, only check them")
    add(
        "--images-per-shard",
        type=_positive,
        metavar="N",
        help="images of the source that make a shard (default: a 64th of them, 256 to 4096)",
    )
    add("--workers", type=_positive, metavar="N", help="processes (default: one for each core)")
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="label file (default: the source's own labels, else class folders)",
    )
    add("--shuffle", type=_seed, metavar="SEED", help="pack in a random order, not the source's")
    add(
        "--max-pixels",
        type=_positive,
        default=MAX_PIXELS,
        metavar="N",
        help="skip larger images undecoded (default: %(default)s)",
    )
    add(
        "--channels",
        type=_positive,
        metavar="N",
        help="give every image N channels: 1, 3 or 4, or the N of arrays (default: as they are)",
    )
    add_value_range(made)
    add(
        "--stats",
        action="store_true",
        help="mean and std of all pixels, kept in DEST; without DEST, of SOURCE as it is",
    )
    add("--verify", type=Path, metavar="DEST", help="check a packed folder, packing nothing")
    return made


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 failed, 2 wrong input, 130 interrupted)."""
    reader = parser()
    given = reader.parse_args(arguments)
    if given.verify is not None and given.source is not None:
        reader.error("--verify DEST packs nothing: leave out SOURCE")
    if given.verify is None and given.source is None:
        reader.error("SOURCE is missing")
    if given.verify is None and given.folder is None and not given.stats:
        reader.error("DEST is missing: the folder to pack to (only --stats needs none)")
    if given.verify is not None:
        _refuse(reader, given, "--verify DEST packs nothing", *OF_PACKING, *OF_READING, "stats")
    elif given.folder is None:
        _refuse(reader, given, "--stats without DEST packs nothing", *OF_PACKING)
    elif given.keep_originals:
        _refuse(reader, given, "--keep-originals encodes nothing", "short_side", "quality")
    workers = given.workers or len(os.sched_getaffinity(0))
    try:
        if given.verify is not None:
            return _verify(given.verify, workers)
        if given.folder is None:
            source = _source(given.source, shuffled=False)[0]
            _print_statistics(*_statistics(source, workers, given))
            return 0
        return _pack(given, workers)
    except KeyboardInterrupt:
        stays = "; what is finished stays, the same command goes on" if given.folder else ""
        print(f"simmim: interrupted{stays}", file=sys.stderr)
        return 130
    except Exception as error:
        return end(error, place=str(given.verify or given.source))


def _refuse(
    reader: argparse.ArgumentParser, given: argparse.Namespace, reason: str, *names: str
) -> None:
    """End with an error where one of the flags has another value than its default."""
    for name in names:
        if getattr(given, name) != reader.get_default(name):
            reader.error(f"{reason}: leave out --{name.replace('_', '-')}")


def _pack(given: argparse.Namespace, workers: int) -> int:
    source, labels = _source(given.source, given.shuffle is not None, given.labels)
    # shards enough for many processes, and the same ones whatever their number
    by_default = min(4096, max(256, -(-len(source.names) // 64)))
    options = Options(
        short_side=None if given.keep_originals else given.short_side or 256,
        quality=given.quality,
        keep_originals=given.keep_originals,
        images_per_shard=given.images_per_shard or by_default,
        shuffle=given.shuffle,
        max_pixels=given.max_pixels,
        value_range=given.value_range,
        channels=given.channels,
    )
    with _progress("packed", len(source.names)) as progress:
        summary = pack(source, given.folder, options, labels, workers=workers, tick=progress.update)
    print(_line(given.folder, summary))
    if given.stats:
        with _progress("measured", summary.images) as progress:
            mean_and_std = pack_statistics(
                given.folder, workers=workers, max_pixels=given.max_pixels, tick=progress.update
            )
        _print_statistics(*mean_and_std)
    return 0


def _source(
    path: str, shuffled: bool, label_file: Path | None = None
) -> tuple[Source, Labels | None]:
    paths = parquet_files(path)
    source: Source
    if paths:
        if shuffled:
            raise DataError(
                f"{path}: parquet has no random access: pack it without --shuffle, and pack that "
                "folder with --shuffle and --keep-originals"
            )
        source = ParquetSource(paths)
    else:
        source = open_source(path)
    return source, labels_of(source, label_file)


def _statistics(
    source: Source, workers: int, given: argparse.Namespace
) -> tuple[list[float], list[float]]:
    with _progress("measured", len(source.names)) as progress:
        sums = statistics(
            source,
            workers=workers,
            max_pixels=given.max_pixels,
            value_range=given.value_range,
            channels=given.channels,
            tick=progress.update,
        )
    if sums.skipped:
        print(f"simmim: {sums.skipped} images could not be read", file=sys.stderr)
    return sums.mean_and_std()


def _print_statistics(mean: list[float], std: list[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        print(f"--data.{name}=[{','.join(f'{value:.6f}' for value in values)}]")


def _verify(folder: Path, workers: int) -> int:
    with _progress("checked", None) as progress:
        images, problems = verify(folder, workers=workers, tick=progress.update)
    for problem in problems[:MAX_PROBLEMS]:
        print(problem)
    if len(problems) > MAX_PROBLEMS:
        print(f"… and {len(problems) - MAX_PROBLEMS} more")
    if problems:
        print(f"simmim: error: {folder}: {len(problems)} problems", file=sys.stderr)
        return 1
    print(f"{folder}: {images} images, all sound")
    return 0


def _line(folder: Path, summary: Summary) -> str:
    line = (
        f"{folder}: {summary.images} images in {summary.shards} shards, "
        f"{_size(summary.bytes_before)} → {_size(summary.bytes_after)}"
    )
    if summary.skipped:
        reasons: Counter[str] = summary.skipped
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        line += f"; skipped {reasons.total()} ({counts}), see {SKIPPED_FILE}"
    return line


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class _Shown:
    """Progress as a bar on a terminal, else as a line now and then."""

    def __init__(self, verb: str, total: int | None, bar: Progress | None) -> None:
        self._verb, self._total, self._bar = verb, total, bar
        self._began = self._told = time.monotonic()
        self._task = None if bar is None else bar.add_task(verb, total=total, note="")

    def update(self, done: int, skipped: int = 0, resumed: int = 0) -> None:
        """Told the images done, skipped, and those of an earlier call."""
        now = time.monotonic()
        speed = (done + skipped) / max(now - self._began, 1e-9)
        note = f"{speed:.1f} images/s" + (f"  skipped {skipped}" if skipped else "")
        at = done + skipped + resumed
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=at, note=note)
        elif now - self._told >= LINE_EVERY_S:
            self._told = now
            of = ""
            if self._total is not None:
                left = (self._total - at) / speed if speed else float("inf")
                of, note = f"/{self._total}", f"{note}  eta {duration(left)}"
            print(f"{self._verb} {at}{of} images  {note}", file=sys.stderr, flush=True)


@contextmanager
def _progress(verb: str, total: int | None) -> Iterator[_Shown]:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Shown(verb, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Shown(verb, total, bar)


def _positive(text: str) -> int:
    return _integer(text, 1, 2**62)


def _quality(text: str) -> int:
    return _integer(text, 1, 100)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**63 - 1)


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is no integer from {low} to {high}")
    return value
