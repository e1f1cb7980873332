"""Loads the native CPU extension once, or keeps the reason why it is missing."""

from importlib import import_module
from types import ModuleType

import torch

# torch first: its bundled libgomp is then the one OpenMP runtime of the process.
try:
    extension: ModuleType | None = import_module("simmim_kernels._cpu")
    missing_reason: str | None = None
except ImportError as error:
    extension = None
    missing_reason = (
        f"the native extension simmim_kernels._cpu is not there ({error}); "
        "install g++ and run `pip install --force-reinstall --no-deps simmim`"
    )

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def reasons_against(*tensors: torch.Tensor | None) -> list[str]:
    """Why the native kernels cannot take these tensors; empty when they can."""
    reasons = [] if missing_reason is None else [missing_reason]
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            reasons.append(f"the native kernels run on the CPU, the tensors are on {tensor.device}")
            break
    for tensor in tensors:
        if tensor is not None and tensor.dtype.is_floating_point and tensor.dtype not in FLOATING:
            reasons.append(
                f"the native kernels take float32, bfloat16 and float16, not {tensor.dtype}"
            )
            break
    return reasons
