"""Whole training steps: ours launched one by one and as a graph, the reference, and the peers."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_stages.stage import (
    Emit,
    config_of,
    is_tiny,
    milliseconds,
    queued_milliseconds,
    rate,
)
from bench.peers.by_method import PEERS
from bench.peers.peer import Unavailable
from bench.steps.engine_row import EngineRow
from bench.steps.images import Images
from bench.steps.peer_row import PeerRow
from simmim.training.graphed_steps import GraphedSteps

BATCHES = (64, 128, 256, 512)


def run(emit: Emit, seconds: float) -> None:
    """Emit a line for every model, row and batch size."""
    measure(emit, seconds, "swin_base", ("ours", "graph", "reference", "timm", "transformers"))


def compiled(emit: Emit, seconds: float) -> None:
    """The same of the compiled peers, whose compilation takes a minute."""
    measure(emit, seconds, "swin_base", ("timm", "transformers"), batches=(128,), compile=True)


def others(emit: Emit, seconds: float) -> None:
    """The same of other models, at one batch size."""
    for model in ("vit_base", "swinv2_base", "swin_large"):
        measure(emit, seconds / 3, model, ("graph", "timm"), batches=(128,))


def measure(
    emit: Emit,
    seconds: float,
    model: str,
    names: tuple[str, ...],
    batches: tuple[int, ...] = BATCHES,
    compile: bool = False,
) -> None:
    """Emit a line for every row and batch size; one that does not fit the memory says so."""
    if is_tiny():
        batches = tuple(sorted({max(2, batch // 64) for batch in batches}))[:2]
    part = seconds / (len(names) * len(batches)) / 3
    for name in names:
        for batch in batches:
            head = {"model": model, "row": name, "compile": compile, "batch": batch}
            try:
                emit("step", **head, **time_row(model, name, batch, part, compile))
            except torch.OutOfMemoryError:
                emit("step", **head, out_of_memory=True)
            except Unavailable as problem:
                emit("step", **head, unavailable=str(problem))
            gc.collect()
            torch.cuda.empty_cache()


def time_row(model: str, name: str, batch: int, seconds: float, compile: bool) -> dict[str, Any]:
    """Times, images per second and peak memory of one row."""
    device = torch.device("cuda", 0)
    base = EngineRow("ours", config_of(model, batch), device)
    images = Images.make(batch, base.model, base.config)
    step: Callable[[], object]
    if name == "ours":
        step = base.step(images)
    elif name == "graph":
        graphed = GraphedSteps(base.run, print)
        step = lambda: graphed([images.batch])  # noqa: E731
    elif name == "reference":
        step = base.through_references("reference").step(images)
    else:
        row = PeerRow(PEERS["simmim"][name](base.spec), base.config, device)
        row.choose_format(images)
        step = (row.compiled() if compile else row).step(images)
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = milliseconds(step, seconds)
    calls = max(5, min(50, int(seconds * 1e3 / max(found["device_ms"], found["host_ms"], 1.0))))
    queued = queued_milliseconds(step, calls)
    return found | {
        "queued_ms": queued,
        "images_per_s": rate(batch, queued),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
