"""The rows that the options of bench/throughput.py ask for."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.peers.by_method import PEERS
from bench.peers.peer import Unavailable
from bench.steps.engine_row import EngineRow
from bench.steps.images import Images
from bench.steps.peer_row import PeerRow
from bench.steps.progress import print_progress
from bench.steps.row import Row
from simmim.method.simsiam import SimSiamMethod

OURS, REFERENCE = "simmim", "reference PyTorch"
WITH_DISTORTION = "simmim with distortion"
# Rows that --compile adds a compiled row to.
COMPILED = ("simmim", "torchvision", "timm", "transformers")


def names_of(method: str) -> list[str]:
    """The names that --only takes; each may stand for several rows."""
    return [OURS, "reference", *PEERS[method]]


def build_rows(
    base: EngineRow, names: Sequence[str], with_compile: bool, images: Images
) -> tuple[list[Row], list[dict[str, str]]]:
    """Build the rows with these names.

    Args:
        base: the row of the engine.
        names: names of rows.
        with_compile: whether to add compiled rows.
        images: what a peer tries its memory formats on.

    Returns:
        The rows in their usual order, and {"name", "reason"} for each row that cannot be built.
    """
    rows: list[Row] = []
    skipped = []
    method = base.config.method.name
    for name in (n for n in names_of(method) if n in names):
        if name == OURS:
            rows.append(base)
        elif name == "reference":
            rows.append(base.through_references(REFERENCE))
        else:
            print_progress(f"building {name}")
            try:
                row = PeerRow(PEERS[method][name](base.spec), base.config, base.device)
            except Unavailable as problem:
                skipped.append({"name": name, "reason": str(problem)})
                print_progress(f"no row {name}: {problem}")
                continue
            if times := row.choose_format(images):
                print_progress(f"{name}: {times}")
            rows.append(row)
        if with_compile and name in COMPILED:
            rows.append(rows[-1].compiled())
        if name == OURS and isinstance(base.method, SimSiamMethod):
            rows.append(base.with_distortion(WITH_DISTORTION))
    return rows, skipped


def check_memory(base: EngineRow, options: argparse.Namespace) -> None:
    """Raise MemoryError if the weights, gradients and optimiser states of all rows do not fit."""
    weights = sum(p.numel() for p in base.model.parameters()) * 4
    # every row has weights and two moments; only one row at a time has gradients
    needed = len(options.only) * 3 * weights + weights
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        try:
            text = Path("/proc/meminfo").read_text(encoding="utf-8")
        except OSError:
            return
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    if needed > free:
        raise MemoryError(
            f"{len(options.only)} rows of {options.model} need {needed / 2**30:.1f} GiB before the "
            f"first activation, and {free / 2**30:.1f} GiB are free; ask for fewer with --only"
        )
