"""One row of bench/data.py: a loader in its own process, bound to one core with all it starts."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from bench.data_loaders.loaders import LOADERS, NEEDS, ON_CUDA, Job
from bench.measuring.processes import cpu_seconds, resident_bytes

COMMAND = Path(__file__).parents[1] / "data.py"
# With this flag the command is the process of a row.
ROW_FLAG = "--row"

# The main process of a loader and its decoder take turns on the core, so a batch may be ready too
# early: this many are taken before the clock starts.
WARM_UP_BATCHES = 6


def serve(name: str, job: Job, core: int, seconds: float) -> None:
    """Run in the process of a row: for every line of its input, time a turn and print a result.

    A turn takes batches for so many seconds; the result is one line of JSON.
    """
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


def missing_reason(name: str) -> str | None:
    """Why a row cannot run; None if it can. Imports may crash, so another process tries them."""
    code = ";".join(f"import {module}" for module in NEEDS.get(name, ())) or "pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@contextmanager
def row_process(name: str, job: Job, core: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `serve`; it and all that it started end with the context."""
    arguments = json.dumps([name, *vars(job).values(), core, seconds], default=str)
    process = subprocess.Popen(
        [sys.executable, str(COMMAND), ROW_FLAG, arguments],
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


def read_answer(process: subprocess.Popen[str], name: str) -> str:
    """The next line that a row's process prints for us.

    Raises:
        SystemExit: the process ended.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    while line := process.stdout.readline():
        if line.startswith(("ready", "{")):  # not the banner of a package
            return line
    last = process.stderr.read().strip().splitlines()[-1:]
    raise SystemExit(f"bench/data.py: the row {name} ended: {' '.join(last)}")


def serve_arguments(text: str) -> None:
    """Run `serve` with the arguments that `row_process` wrote as JSON."""
    name, folder, shards, source, size, batch, core, seconds = json.loads(text)
    paths = [Path(shard) for shard in shards]
    serve(name, Job(Path(folder), paths, Path(source), size, batch), core, seconds)
