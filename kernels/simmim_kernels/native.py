"""Loads the native CPU extension once, or keeps the reason why it is missing."""

import math
from collections.abc import Sequence
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

# Whether this processor multiplies bfloat16 matrices faster than float32 ones.
FAST_BFLOAT16: bool = extension is not None and extension.has_fast_bfloat16()

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
# Code and bits of DLPack, of what large outputs are.
DLPACK_TYPES = {
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.int32: (0, 32),
    torch.bool: (6, 8),
}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


# Smaller outputs come from PyTorch's allocator, which is fast enough for them.
RECYCLED_BYTES = 1 << 19


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Contiguous uninitialised output; a large one in memory that an earlier output has left.

    The memory of large outputs stays with the process for the next step: at most a quarter more
    than was once in use at one time. `release_memory` gives it back to the system.
    """
    if extension is None or math.prod(shape) * dtype.itemsize < RECYCLED_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    out: torch.Tensor = extension.recycled_tensor(shape, *DLPACK_TYPES[dtype])
    return out


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`empty` for a map [B, C, …] whose channels lie side by side.

    Not a view: autograd adds to a gradient in place only if nothing else holds its memory, as the
    base of a view does.
    """
    B, C, *sides = shape
    rows = empty((B, *sides, C), dtype)
    first, *others, last = rows.stride()
    return rows.as_strided_(tuple(shape), (first, last, *others))


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's first element is; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrix products of activations of `dtype` run in.

    16-bit ones run in float32 where the processor would only emulate them, which is slower.
    """
    return dtype if dtype == torch.bfloat16 and FAST_BFLOAT16 else torch.float32


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a · b in their dtype, also under autocast; into recycled memory if there is no `out`."""
    if out is None:
        out = empty((a.shape[0], b.shape[1]), a.dtype)
    # with `out` autocast leaves it alone, and would otherwise take it back to 16 bits
    return torch.mm(a, b, out=out)


def rows_and_dtypes(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """What passes over rows take first: rows, columns, codes of both dtypes, threads.

    `matrix` goes into or comes out of a product, `dtype` is that of the activations beside it.
    """
    rows, width = matrix.shape
    return rows, width, DTYPE_CODES[dtype], DTYPE_CODES[matrix.dtype], torch.get_num_threads()


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` itself if it has `dtype`, else a copy in recycled memory."""
    return tensor if tensor.dtype == dtype else empty(tensor.shape, dtype).copy_(tensor)


def release_memory() -> int:
    """Gives memory that is kept for large outputs back to the system; returns how many bytes."""
    return 0 if extension is None else int(extension.release_memory())


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
