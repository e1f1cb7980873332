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

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def reasons_against(*tensors: torch.Tensor | None) -> list[str]:
    """Why the native kernels cannot take these tensors; empty when they can."""
    reasons = [] if missing_reason is None else [missing_reason]
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            reasons.append(f"the native kernels run on the CPU, the tensors are on {tensor.device}")
            break
    floating = [t for t in tensors if t is not None and t.dtype.is_floating_point]
    if len({t.dtype for t in floating}) > 1:
        reasons.append(f"dtypes differ: {', '.join(str(t.dtype) for t in floating)}")
    elif floating and floating[0].dtype not in DTYPE_CODES:
        reasons.append(
            f"the native kernels take float32, bfloat16 and float16, not {floating[0].dtype}"
        )
    return reasons
