"""Images per second and core of data loaders, on the same photos: this one and other packages'.

    python bench/data.py --source DIR --json PATH

Every row runs in a process of its own, with all that it starts on one core, and the rows take
turns. After a warm-up a turn times batches as they come. bench/README.md explains the columns.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rich import box
from rich.console import Console
from rich.table import Table

from data_loaders import LOADERS, NEEDS, ON_CUDA, Job
from simmim.data.decode import UnreadableImage, read_header
from simmim.data.open import open_source
from simmim.environment import git_commit, package_versions
from simmim.errors import DataError, RunError
from simmim.files import write_text
from simmim.packing.options import Options
from simmim.packing.pack import pack

PACKED = "-packed"
PAGE = resource.getpagesize()
TICKS = os.sysconf("SC_CLK_TCK")

# The main process of a loader and its decoder take turns on the core, so a batch may come early:
# this many are drawn before the clock starts.
WARM_UP_BATCHES = 6


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all that it started, user and system."""
    ticks = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def resident_bytes(pid: int) -> int:
    """Proportional resident memory of a process and all that it started."""
    total = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def serve(name: str, job: Job, core: int, seconds: float) -> None:
    """A row's process: for every line that it is sent, one turn, and one line of results."""
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    make = (LOADERS | ON_CUDA)[name]
    for module in NEEDS.get(name, ()):
        importlib.import_module(module)
    print("ready", flush=True)
    for _ in sys.stdin:
        with closing(make(job)) as batches:  # type: ignore[type-var]
            warm_up = WARM_UP_BATCHES * job.batch
            while warm_up > 0:
                warm_up -= next(batches)
            images, peak = 0, resident_bytes(os.getpid())
            cpu, begin = cpu_seconds(os.getpid()), time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < seconds:
                images += next(batches)
            cpu = cpu_seconds(os.getpid()) - cpu
            peak = max(peak, resident_bytes(os.getpid()))
        print(json.dumps({"images": images, "s": elapsed, "cpu_s": cpu, "peak": peak}), flush=True)


def missing(name: str) -> str | None:
    """Why a row cannot run, found out in a process of its own: imports may crash."""
    code = ";".join(f"import {module}" for module in NEEDS.get(name, ())) or "pass"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if found.returncode == 0 else found.stderr.strip().splitlines()[-1]


@contextmanager
def row_process(name: str, job: Job, core: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `serve`."""
    arguments = json.dumps([name, *vars(job).values(), core, seconds], default=str)
    process = subprocess.Popen(
        [sys.executable, __file__, "--row", arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(process: subprocess.Popen[str], name: str) -> str:
    """The next line of a row's process."""
    assert process.stdout is not None
    assert process.stderr is not None
    while line := process.stdout.readline():
        if line.startswith(("ready", "{")):  # loaders print banners
            return line
    last = process.stderr.read().strip().splitlines()[-1:]
    raise SystemExit(f"bench/data.py: the row {name} ended: {' '.join(last)}")


def prepare(source: Path, work: Path) -> dict[str, Path]:
    """The photos as a class folder and as tar shards, as they are and packed small.

    Only JPEGs that every loader reads are taken; says how many were left out.
    """
    photos = open_source(str(source))
    raw = work / "raw" / "folder" / "class"
    raw.mkdir(parents=True)
    (work / "raw" / "shards").mkdir()
    left_out = 0
    with tarfile.open(work / "raw" / "shards" / "000000.tar", "w") as archive:
        for index in range(len(photos.names)):
            try:
                data = photos.read(index)
                plain = read_header(data).plain
            except (UnreadableImage, OSError):
                plain = False
            if not plain:
                left_out += 1
                continue
            path = raw / f"{index:08d}.jpg"
            path.write_bytes(data)
            archive.add(path, path.name)
    if not any(raw.iterdir()):
        raise DataError(f"{source}: no JPEG that every loader reads")
    if left_out:
        print(f"{left_out} of {len(photos.names)} images left out: no plain JPEG", file=sys.stderr)
    pack(open_source(str(raw)), work / "packed" / "shards", Options(short_side=256, quality=90))
    small = work / "packed" / "folder" / "class"
    small.mkdir(parents=True)
    for shard in sorted((work / "packed" / "shards").glob("*.tar")):
        with tarfile.open(shard) as archive:
            archive.extractall(small, filter="data")
    return {"": work / "raw", PACKED: work / "packed"}


def measure(options: argparse.Namespace, names: list[str], work: Path) -> list[dict[str, Any]]:
    """Rows in turns; medians over the turns."""
    places = prepare(options.source, work)
    jobs = {}
    for name in names:
        place = places[PACKED if name.endswith(PACKED) else ""]
        folder, shards = place / "folder" / "class", sorted((place / "shards").glob("*.tar"))
        ours = place / "shards" if place == places[PACKED] else folder
        jobs[name] = Job(folder, shards, ours, options.size, options.batch)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        processes = {}
        for name in names:
            print(f"\rstarting {name:<32}", end="", file=sys.stderr)
            process = row_process(
                name.removesuffix(PACKED), jobs[name], options.core, options.seconds
            )
            processes[name] = stack.enter_context(process)
            answer(processes[name], name)
        for turn in range(options.rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                print(f"\rround {turn + 1}/{options.rounds}: {name:<24}", end="", file=sys.stderr)
                begin = processes[name].stdin
                assert begin is not None
                begin.write("go\n")
                begin.flush()
                found[name].append(json.loads(answer(processes[name], name)))
    print(file=sys.stderr)
    rows = []
    for name, turns in found.items():
        speeds = [turn["images"] / turn["s"] for turn in turns]
        rows.append(
            {
                "name": name,
                "images_per_s_per_core": statistics.median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
                "cpu_s_per_image": statistics.median(t["cpu_s"] / t["images"] for t in turns),
                "peak_bytes": int(max(turn["peak"] for turn in turns)),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as two tables: the photos as they are, and packed."""
    console = Console()
    console.width = max(console.width, 100)
    speed = {row["name"]: row["images_per_s_per_core"] for row in rows}
    for suffix, title in (("", "photos as they are"), (PACKED, "the same, packed at 256 px")):
        table = Table(title=title, box=box.SIMPLE)
        table.add_column("", no_wrap=True)
        for column in ("images/s/core", "min–max", "simmim is", "CPU ms/image", "peak MiB"):
            table.add_column(column, justify="right")
        ours = speed.get("simmim" + suffix)
        for row in rows:
            if row["name"].endswith(PACKED) != bool(suffix):
                continue
            table.add_row(
                row["name"],
                f"{row['images_per_s_per_core']:.0f}",
                f"{row['slowest']:.0f}–{row['fastest']:.0f}",
                f"{ours / row['images_per_s_per_core']:.2f}×" if ours else "",
                f"{1e3 * row['cpu_s_per_image']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
            )
        if table.row_count:
            console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of images per second and core, a panel each for photos and packed shards."""
    from matplotlib.figure import Figure

    kinds = [(suffix, [r for r in rows if r["name"].endswith(PACKED) == bool(suffix)])
             for suffix in ("", PACKED)]  # fmt: skip
    kinds = [(suffix, own) for suffix, own in kinds if own]
    figure = Figure(figsize=(5.5 * len(kinds), 3.4), layout="constrained")
    for axes, (suffix, own) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        own = sorted(own, key=lambda row: row["images_per_s_per_core"])
        names = [row["name"].removesuffix(PACKED) for row in own]
        colours = [
            "tab:blue" if n == "simmim" else "lightgrey" if n == "decode-only" else "tab:grey"
            for n in names
        ]
        bars = axes.barh(names, [row["images_per_s_per_core"] for row in own], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("images/s on one core")
        axes.set_title("packed at 256 px" if suffix else "photos as they are")
    figure.savefig(path, format="png", dpi=150)


def describe() -> dict[str, Any]:
    """The machine and the versions of what was compared."""
    found: dict[str, Any] = dict(package_versions())
    for package in ("torchvision", "timm", "webdataset", "simplejpeg", "nvidia-dali-cuda130"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": models[0] if models else None,
        "versions": found,
    }


def main() -> int:
    if sys.argv[1:2] == ["--row"]:
        name, folder, shards, source, size, batch, core, seconds = json.loads(sys.argv[2])
        paths = [Path(shard) for shard in shards]
        serve(name, Job(Path(folder), paths, Path(source), size, batch), core, seconds)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder or tar of JPEG photos")
    add("--json", type=Path, help="write the rows and the machine there")
    add("--plot", type=Path, help="draw the rows (PNG)")
    add("--size", type=int, default=192, help="side of the crops, pixels (default: %(default)s)")
    add("--batch", type=int, default=64, help="images of a batch (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of every row (default: %(default)s)")
    add("--seconds", type=float, default=4, help="length of a turn (default: %(default)s)")
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="core to run on")
    add("--only", help="rows to run, comma-separated; a name stands for its packed row too")
    options = parser.parse_args()
    if not options.source.exists():
        parser.error(f"--source={options.source}: no such file or folder")
    for path in filter(None, (options.json, options.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: {path.parent} is no folder")
    names = list(LOADERS)
    if shutil.which("nvidia-smi"):
        names += ON_CUDA
    if options.only:
        wanted = options.only.split(",")
        known = [*names, *(name + PACKED for name in names)]
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"--only={unknown[0]}: known are {', '.join(known)}")
    rows = []
    for name in names:
        if reason := missing(name):
            print(f"{name} left out: {reason}", file=sys.stderr)
        else:
            rows += [name, name + PACKED]
    if options.only:
        rows = [r for r in rows if r in wanted or r.removesuffix(PACKED) in wanted]
    try:
        with tempfile.TemporaryDirectory(prefix="simmim-bench-") as work:
            found = measure(options, rows, Path(work))
    except RunError as error:
        print(f"bench/data.py: {error}", file=sys.stderr)
        return 1
    show(found)
    if options.json:
        settings = {k: getattr(options, k) for k in ("size", "batch", "rounds", "seconds")}
        record = {**describe(), "settings": settings, "rows": found}
        write_text(options.json, json.dumps(record, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
