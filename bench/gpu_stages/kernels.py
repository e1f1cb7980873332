"""Every op with Triton kernels on the tensors of every model, beside the rate of a copy."""

import torch

from bench.gpu_stages.stage import Emit, copy_rate, is_tiny, milliseconds, rate
from simmim_kernels.report.cases import cases


def run(emit: Emit, seconds: float) -> None:
    """Emit the time of every case of the report, and the share of the copy rate that it reaches."""
    copied = copy_rate(2**20 if is_tiny() else 2**30, 0.2)
    with torch.device("cuda"):
        known = cases()[::8] if is_tiny() else cases()
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
