"""Images per second on one core of data loaders, here and in other packages, on the same photos.

    python bench/data.py --source PHOTOS --json PATH

Every row runs in its own process, which is bound to one core with all that it starts. The rows take
turns; a turn times batches after a warm-up. bench/README.md explains the columns.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.data_loaders.loaders import LOADERS, ON_CUDA, Job
from bench.data_loaders.photos import PACKED, prepare_photos
from bench.data_loaders.report import plot, print_tables
from bench.data_loaders.row_process import (
    ROW_FLAG,
    missing_reason,
    read_answer,
    row_process,
    serve_arguments,
)
from bench.measuring.machine import now, versions_with
from bench.measuring.record import write_record
from simmim.environment import device_name, git_commit
from simmim.errors import RunError

COMPARED_PACKAGES = ("torchvision", "timm", "webdataset", "simplejpeg", "nvidia-dali-cuda130")


def measure(options: argparse.Namespace, names: list[str], work: Path) -> list[dict[str, Any]]:
    """Time the rows in turns; each number is the median of the turns of a row."""
    places = prepare_photos(options.source, work)
    jobs = {}
    for name in names:
        place = places[PACKED if name.endswith(PACKED) else ""]
        folder, shards = place / "folder" / "class", sorted((place / "shards").glob("*.tar"))
        ours = place / "shards" if place == places[PACKED] else folder
        jobs[name] = Job(folder, shards, ours, options.size, options.batch)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        processes = {}
        for name in names:
            print(f"\rstarting {name:<32}", end="", file=sys.stderr)
            process = row_process(
                name.removesuffix(PACKED), jobs[name], options.core, options.seconds
            )
            processes[name] = stack.enter_context(process)
            read_answer(processes[name], name)
        for number in range(options.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                print(f"\rround {number + 1}/{options.rounds}: {name:<24}", end="", file=sys.stderr)
                requests = processes[name].stdin
                assert requests is not None
                requests.write("go\n")
                requests.flush()
                turns[name].append(json.loads(read_answer(processes[name], name)))
    print(file=sys.stderr)
    return [row_numbers(name, turns[name]) for name in names]


def row_numbers(name: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    """The numbers of a row, from its turns."""
    speeds = [turn["images"] / turn["s"] for turn in turns]
    return {
        "name": name,
        "images_per_s_per_core": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "cpu_s_per_image": statistics.median(t["cpu_s"] / t["images"] for t in turns),
        "peak_bytes": int(max(turn["peak"] for turn in turns)),
    }


def parse_options() -> argparse.Namespace:
    """Options that are checked, and `rows`: the names of the rows that can run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder or tar of JPEG photos")
    add("--json", type=Path, help="file to write the rows and the machine to")
    add("--plot", type=Path, help="PNG file to draw the rows to")
    add("--size", type=int, default=192, help="side of the crops in pixels (default: %(default)s)")
    add("--batch", type=int, default=64, help="images per batch (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of every row (default: %(default)s)")
    add("--seconds", type=float, default=4, help="length of a turn (default: %(default)s)")
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="core to run on")
    add("--only", help="rows to run, comma-separated; a name includes its packed row")
    options = parser.parse_args()
    if not options.source.exists():
        parser.error(f"--source={options.source}: no such file or folder")
    for path in filter(None, (options.json, options.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: {path.parent} is no folder")
    names = list(LOADERS)
    if shutil.which("nvidia-smi"):
        names += ON_CUDA
    wanted = options.only.split(",") if options.only else names
    known = [*names, *(name + PACKED for name in names)]
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--only={unknown[0]}: known are {', '.join(known)}")
    options.rows = []
    for name in names:
        if reason := missing_reason(name):
            print(f"{name} left out: {reason}", file=sys.stderr)
        else:
            options.rows += [row for row in (name, name + PACKED) if {name, row} & {*wanted}]
    return options


def main() -> int:
    """Run the command; 1 if the photos cannot be used."""
    if sys.argv[1:2] == [ROW_FLAG]:
        serve_arguments(sys.argv[2])
        return 0
    options = parse_options()
    try:
        with tempfile.TemporaryDirectory(prefix="simmim-bench-") as work:
            rows = measure(options, options.rows, Path(work))
    except RunError as error:
        print(f"bench/data.py: {error}", file=sys.stderr)
        return 1
    print_tables(rows)
    if options.json:
        record = {
            "time": now(),
            "commit": git_commit(),
            "cpu": device_name(torch.device("cpu")),
            "versions": versions_with(COMPARED_PACKAGES),
            "settings": {k: getattr(options, k) for k in ("size", "batch", "rounds", "seconds")},
            "rows": rows,
        }
        write_record(options.json, record)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
