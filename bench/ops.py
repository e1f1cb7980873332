"""Times the ops against eager PyTorch and torch.compile, forward and backward: `make bench`.

All sides are checked to be equal first and timed in turns in one run. Only their ratios mean
anything on another machine. "copy" is the time that `Tensor.copy_` between two warm buffers needs
for the fewest bytes that the op must move. "clone" is the same into fresh memory, which an op that
returns new tensors gets on a CPU: there the system clears every page first.
"""

from typing import Any

import pytest
import torch

from bench.op_cases.catalogue import CASES, CPU_CASES, make_case
from bench.op_cases.measurement import measure_case

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("name", [*CASES, *CPU_CASES])
def test_op(benchmark: Any, name: str) -> None:
    case = make_case(name, DEVICE, "native")
    benchmark.extra_info.update(measure_case(case, DEVICE))
    benchmark.pedantic(case.sides["ours"], rounds=9, warmup_rounds=2)
