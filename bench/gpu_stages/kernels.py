"""Ops with Triton kernels: beside the rate of a copy, and beside what they replace."""

import torch

from bench.gpu_stages.stage import Emit, copy_rate, is_tiny, milliseconds, rate, values_are_real
from bench.op_cases.catalogue import CASES, make_case
from bench.op_cases.measurement import measure_case
from simmim_kernels.report.cases import cases


def run(emit: Emit, seconds: float) -> None:
    """Emit the time of every case of the report, and the share of the copy rate that it reaches.

    Without the losses: the time of those hangs on what is hidden, which cases without values do not
    say. `ops` times them.
    """
    copied = copy_rate(2**20 if is_tiny() else 2**30, 0.2)
    with torch.device("cuda"):
        known = [case for case in cases() if "loss" not in case.op]
    known = known[::8] if is_tiny() else known
    for case in known:
        with torch.device("cuda"):
            found = milliseconds(case.make, seconds / len(known) / 2)
        reached = rate(case.bytes_needed, found["device_ms"])
        share = reached / copied if reached and copied else None
        emit(
            "op",
            case=case.name,
            bytes_needed=case.bytes_needed,
            bytes_moved=case.bytes_moved,
            share_of_copy_rate=share,
            **found,
        )


def ops(emit: Emit, seconds: float) -> None:
    """Emit the times of every op beside eager PyTorch and torch.compile, after a check of both."""
    if not values_are_real():
        emit("skipped", why="ops are checked before they are timed, and nothing is computed here")
        return
    device = torch.device("cuda", 0)
    for name in list(CASES)[:1] if is_tiny() else CASES:
        emit("op", case=name, **measure_case(make_case(name, device, "triton"), device))
