"""Time and memory of a case."""

from collections.abc import Callable
from typing import Any

import torch

from bench.measuring.timing import interleaved, peak_bytes
from bench.op_cases.case import Case


def measure_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds and peak memory of every side, ratios to ours, our share of the copy rate."""
    case.check()
    sides: dict[str, Callable[[], object]] = dict(case.sides)
    if case.fewest_bytes is not None:
        # a copy reads and writes, so half of the bytes are its source
        source = torch.ones(case.fewest_bytes // 2, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        sides["copy"] = lambda: target.copy_(source)
        sides["clone"] = source.clone
    milliseconds = interleaved(sides, device)
    ours = milliseconds["ours"]
    return {
        "milliseconds": milliseconds,
        "ratio": {
            name: t / ours
            for name, t in milliseconds.items()
            if name not in ("ours", "copy", "clone")
        },
        "share_of_copy_rate": {
            name: milliseconds[name] / ours for name in ("copy", "clone") if name in milliseconds
        },
        "fewest_bytes": case.fewest_bytes,
        "peak_bytes": {name: peak_bytes(side, device) for name, side in case.sides.items()},
        "targets": case.targets,
    }
