"""Times the ops against eager PyTorch and torch.compile, forward and backward: `make bench`.

All sides are checked equal first and timed in turns in one run; only their ratios mean anything on
another machine. "copy" is what `Tensor.copy_` between two warm buffers would need for the fewest
bytes that the op must move, "clone" the same into fresh memory, which is what an op that returns
new tensors gets on the CPU: there the system clears every page first.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import CASES, CPU_CASES, Case, make_case
from timing import interleaved, peak_bytes

DEVICE = torch.device("cpu")


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of every side, their ratios to ours, share of the copy rate, peak memory."""
    case.check()
    sides: dict[str, Callable[[], object]] = dict(case.sides)
    if case.fewest_bytes is not None:
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


@pytest.mark.parametrize("name", [*CASES, *CPU_CASES])
def test_op(benchmark: Any, name: str) -> None:
    case = make_case(name, DEVICE, "native")
    benchmark.extra_info.update(measure(case, DEVICE))
    benchmark.pedantic(case.sides["ours"], rounds=9, warmup_rounds=2)
