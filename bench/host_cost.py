"""What a training step costs the host of a GPU: its milliseconds, launches and peak memory.

    python bench/host_cost.py --model swin_base --batch 128

No GPU is needed: the process runs over stand-ins for CUDA's libraries (tests/gpu_sim/cuda_host),
over which every launch succeeds and does nothing. Time is that of Python, dispatch and launching on
one thread; launches and memory are exact; losses are not computed. A step is limited by its host
where this time is longer than the device's. The rows are those of bench/throughput.py, in turns.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bench.steps.build import OURS, build_rows
from bench.steps.engine_row import EngineRow
from bench.steps.images import Images
from bench.steps.options import parse_options
from bench.steps.progress import print_progress
from bench.steps.row import Row
from gpu_sim.cuda_host import convolutions
from gpu_sim.cuda_host.stand_in import KINDS, Counts, begin_again
from simmim.training.graphed_steps import GraphedSteps


def main() -> int:
    """The exit code."""
    if reason := begin_again():
        print(f"host_cost.py: {reason}", file=sys.stderr)
        return 2
    options = parse_options([*sys.argv[1:], "--device=cuda"])
    found = measure(options)
    print_table(found)
    if options.json:
        head = {"label": "host-run", "torch": torch.__version__, "batch": options.batch[0]}
        content = head | {"model": options.config.model.name, "rows": found}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Build the rows, make their first steps, and time them in turns."""
    torch.set_num_threads(1)
    installed = convolutions.install()
    device = torch.device("cuda", 0)
    print_progress(f"building {options.config.model.name}")
    base = EngineRow(OURS, options.config, device)
    images = Images.make(options.batch[0], base.model, options.config)
    rows, _ = build_rows(base, options.only, options.compile, images)
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        steps[row.name] = row.step(images)
        found[row.name] = look_at(row, row.name, steps[row.name])
    if OURS in steps:
        graphed = GraphedSteps(base.run, print_progress)
        name = f"{OURS}, CUDA graph"
        steps[name] = lambda: graphed([images.batch])
        for _ in range(4):
            steps[name]()
        # what a graph holds was taken when it was captured: its peak is that of the step in it
        peak = {"peak_bytes": found[OURS]["peak_bytes"]}
        found[name] = look_at(base, name, steps[name]) | peak
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(options.rounds, 15)):
        order = list(steps.items())
        for name, step in order if turn % 2 == 0 else reversed(order):
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
        gc.collect()
    for name, samples in times.items():
        found[name]["host_ms"] = median(samples)
    del installed
    return found


def look_at(row: Row, name: str, step: Callable[[], Any]) -> dict[str, Any]:
    """Counts of a later step, and its peak memory, as if no other row were there."""
    counts = Counts()
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    step()
    start, before = counts.read(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    end = counts.read()
    peak = torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in kept_by(row))
    print_progress(f"{name}: first step {first:.1f} s")
    spent = {kind: end[kind] - start[kind] for kind in end}
    spent["launches"] = sum(spent[kind] for kind in KINDS) + spent["graph_launches"]
    return {**spent, "peak_bytes": peak, "first_step_s": first}


def kept_by(row: Row) -> Iterator[Tensor]:
    """The tensors that a row keeps from step to step."""
    yield from row.model.parameters()
    yield from row.model.buffers()
    for state in row.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    if isinstance(row, EngineRow):
        yield from row.run.weight_copies.copies


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """A line for every row."""
    head = ("host ms", "launches", "torch", "Triton", "products", "reads", "waits", "GiB")
    print(f"{'row':28}" + "".join(f"{name:>10}" for name in head))
    for name, row in found.items():
        numbers = (row[k] for k in ("launches", "torch", "triton", "products", "reads"))
        print(
            f"{name:28}{row['host_ms']:10.1f}"
            + "".join(f"{number:10}" for number in numbers)
            + f"{row['synchronisations']:10}{row['peak_bytes'] / 2**30:10.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
