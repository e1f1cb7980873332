"""Measures on a GPU, stage by stage, within a number of minutes: `make bench-gpu`.

    python bench/gpu.py --minutes 14

Stages run in the order of what they are worth, each in a process of its own with its own limit.
Every result is a line of the record as soon as it is there: a stage that hangs, crashes or finds no
time costs its own results only. Nothing is downloaded; peers that are not installed are left out.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu_stages.stage import PRELOAD, TINY, append, is_tiny, values_are_real
from simmim.environment import git_commit, package_versions

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    """A part of the measurements.

    Attributes:
        name: of the stage.
        function: module of bench.gpu_stages, and the function in it.
        seconds: that it is given at most; less where less is left.
    """

    name: str
    function: str
    seconds: int


# The most valuable first; their limits add up to 14 minutes and a half.
STAGES = (
    Stage("environment", "environment.run", 30),
    Stage("exact-steps", "exact_steps.run", 90),
    Stage("steps", "whole_steps.run", 130),
    Stage("device-tests", "device_tests.run", 100),
    Stage("profile", "profiled.run", 40),
    Stage("kernels", "kernels.run", 70),
    Stage("photos", "photos.run", 60),
    Stage("attention-sweep", "attention_sweep.run", 70),
    Stage("ops", "kernels.ops", 90),
    Stage("compiled-peers", "whole_steps.compiled", 100),
    Stage("other-models", "whole_steps.others", 60),
    Stage("counters", "profiled.counters", 40),
)
# A stage with less than this left is not begun.
LEAST_SECONDS = 10


def main() -> int:
    """0 if every stage that ran succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=14.0, help="for all stages together")
    parser.add_argument("--only", help="stages, separated by commas; default: all")
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu-NAME.jsonl")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return run_stage(options.stage, options.seconds, options.output)
    known = [stage.name for stage in STAGES]
    chosen = options.only.split(",") if options.only else known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here (CUDA {torch.version.cuda})")
    return run_all([stage for stage in STAGES if stage.name in chosen], options)


def run_all(stages: list[Stage], options: argparse.Namespace) -> int:
    """Run stages until the time is up; print and record how each ended."""
    name = torch.cuda.get_device_name()
    slug = re.sub(r"\W+", "-", name).strip("-").lower()
    output = options.output or ROOT / "bench" / "results" / f"gpu-{slug}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        print(f"gpu.py: {output} is there already: name another --output", file=sys.stderr)
        return 2
    begin = time.monotonic()
    append(output, {
        "label": "measured" if values_are_real() else "host-run", "device": name,
        "versions": package_versions(), "commit": git_commit(), "minutes": options.minutes,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    })  # fmt: skip
    ended = []
    for stage in stages:
        left = options.minutes * 60 - (time.monotonic() - begin)
        status, why, seconds = "no time left", "", 0.0
        if left >= LEAST_SECONDS:
            limit, started = min(stage.seconds, left), time.monotonic()
            print(f"[{started - begin:5.0f} s] {stage.name}, {limit:.0f} s at most", flush=True)
            status, why = run_apart(stage, limit, output, options.tiny)
            seconds = time.monotonic() - started
        end = {"stage": stage.name, "status": status, "seconds": round(seconds, 1), "why": why}
        append(output, end)
        print(f"          {stage.name}: {status} after {seconds:.0f} s {why[-300:]}", flush=True)
        ended.append(status)
    print(f"written: {output}; please send it back")
    return 0 if all(status in ("done", "no time left") for status in ended) else 1


def run_apart(stage: Stage, limit: float, output: Path, tiny: bool) -> tuple[str, str]:
    """How a stage ended in its own process, and the last of what it said if it failed."""
    command = [sys.executable, str(Path(__file__)), "--stage", stage.name,
               "--seconds", str(limit), "--output", str(output)]  # fmt: skip
    environment = os.environ | {TINY: "1" if tiny else "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr or ""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        return "out of time", text[-800:]
    if done.returncode:
        return "failed", (done.stderr.strip() or done.stdout.strip())[-1500:]
    return "done", ""


def run_stage(name: str, seconds: float, output: Path) -> int:
    """Run one stage here, and record its results as they come."""
    if PRELOAD in os.environ:
        importlib.import_module(os.environ[PRELOAD])
    (stage,) = [stage for stage in STAGES if stage.name == name]
    module, _, function = stage.function.partition(".")

    def emit(what: str, **values: Any) -> None:
        append(output, {"stage": name, "what": what} | values)

    # the results must be there before the limit ends the process
    given = 4.0 if is_tiny() else 0.8 * seconds
    getattr(importlib.import_module(f"bench.gpu_stages.{module}"), function)(emit, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
