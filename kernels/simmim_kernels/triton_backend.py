"""Whether Triton can run an op on some tensors, or the reasons why it cannot; imports it late."""

import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def missing_reason() -> str | None:
    """Why Triton cannot be imported; None when it can."""
    try:
        import_module("triton")
    except Exception as error:  # a broken install raises whatever it likes
        return f"triton cannot be imported ({error}); `pip install triton` (Linux)"
    return None


def interpreting() -> bool:
    """True when Triton's interpreter is on: kernels then run on the CPU, slowly (for tests)."""
    knobs = sys.modules.get("triton.knobs")
    return knobs is not None and bool(knobs.runtime.interpret)


_OPAQUE: tuple[Any, ...] = (missing_reason, interpreting)
for _function in _OPAQUE:
    # What torch.compiler.assume_constant_result does, so that torch.compile does not trace what
    # happens inside; to call it would import all of torch.compile, which takes longer than torch.
    _function._dynamo_marked_constant = True


def reasons_against(*tensors: torch.Tensor | None) -> list[str]:
    """Why the Triton kernels cannot take these tensors; empty when they can."""
    present = [t for t in tensors if t is not None]
    reasons = []
    if present and present[0].device.type != "cuda" and not interpreting():
        reasons.append(
            f"the Triton kernels run on a CUDA or ROCm device, the tensors are on "
            f"{present[0].device}"
        )
    elif (reason := missing_reason()) is not None:
        reasons.append(reason)
    for tensor in present:
        if tensor.dtype.is_floating_point and tensor.dtype not in DTYPES:
            reasons.append(
                f"the Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}"
            )
            break
        if tensor.numel() >= 2**35:
            reasons.append(f"a tensor of {tensor.numel()} elements is beyond their 2^35")
    return reasons


def product_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of a kernel's products: that of torch's own in float32.

    It does not matter for 16-bit ones. torch tells it by this name whichever of its names set it;
    `allow_tf32` raises once the other was used.
    """
    ieee = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if ieee else "tf32"
