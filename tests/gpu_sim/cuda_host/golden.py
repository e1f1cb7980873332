"""The record of what a step of every model launches and keeps: host_run.json.

`python tests/gpu_sim/cuda_host/golden.py` writes it.
"""

import gc
import json
import sys
from pathlib import Path

import torch

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.path.insert(0, str(Path(__file__).parents[3]))

from bench.steps.engine_row import EngineRow
from bench.steps.images import Images
from bench.steps.options import parse_options
from gpu_sim.cuda_host import convolutions, stand_in

RECORD = Path(__file__).parents[1] / "host_run.json"
BATCH = 8
MODELS = {
    "swin_base": [],
    "swinv2_base": [],
    "vit_base": [],
    "convnext_tiny": [],
    "resnet50": [],
    "resnet50, simsiam": ["--method=simsiam"],
    "vit_small_tokens": [],
}


def measure(name: str) -> dict[str, int]:
    """Launches, reads, waits and allocations of a later step, and the bytes in use at its peak."""
    for dtype in (torch.float32, torch.bfloat16):  # the products' room for work is no model's
        square = torch.zeros(16, 16, device="cuda", dtype=dtype)
        torch.addmm(square[0], square.mm(square), square)
    gc.collect()
    torch.cuda.empty_cache()
    counts, before = stand_in.Counts(), torch.cuda.memory_allocated()
    model = name.partition(",")[0]
    flags = ["--device=cuda", f"--model={model}", f"--batch={BATCH}", *MODELS[name]]
    options = parse_options(flags)
    row = EngineRow(name, options.config, torch.device("cuda", 0))
    step = row.step(Images.make(BATCH, row.model, options.config))
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    start = counts.read()
    step()
    end = counts.read()
    names = (*stand_in.KINDS, "reads", "synchronisations", "allocations")
    peak = torch.cuda.max_memory_allocated() - before
    return {name: end[name] - start[name] for name in names} | {"peak_bytes": peak}


def read() -> dict[str, dict[str, int]]:
    """What is on record, by model."""
    record: dict[str, dict[str, int]] = json.loads(RECORD.read_text())["models"]
    return record


def main() -> None:
    """Write the record."""
    if reason := stand_in.begin_again():
        sys.exit(f"golden.py: {reason}")
    installed = convolutions.install()
    models = {name: measure(name) for name in MODELS}
    del installed
    head = {"torch": torch.__version__, "batch": BATCH, "label": "host-run"}
    RECORD.write_text(json.dumps(head | {"models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
