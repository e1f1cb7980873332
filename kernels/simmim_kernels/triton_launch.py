"""Launches Triton kernels at a few microseconds of the host's time.

Triton binds, types and specialises every argument anew at each launch. Here that is done once for
each combination of dtypes, numbers and constants; later launches look it up.
"""

from functools import partial, reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

# A launch with ever new numbers is none of ours; this bounds what it would cost.
_MOST_REMEMBERED = 4096
# Triton compiles for addresses that this divides, or for any.
_ALIGNMENT = 16


class Kernel:
    """A kernel that is launched as `kernel[grid](*arguments, **constants)`, as Triton's are.

    Arguments go by position: tensors, whose parameters are named p_…, then numbers. What is known
    when the kernel is compiled follows by name, with num_warps and num_stages.

    Attributes:
        function: Triton's own, which launches whatever is met for the first time, tensors that are
            not aligned, and everything on a CPU (interpreted, or compiled ahead of time) and on
            ROCm.
    """

    def __init__(self, function: JITFunction[Any]) -> None:
        self.function = function
        names = function.arg_names
        self._tensors = sum(name.startswith("p_") for name in names)
        assert all(name.startswith("p_") for name in names[: self._tensors])
        self._launches: dict[Any, tuple[Any, Any, Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        count = self._tensors
        tensors: tuple[Tensor, ...] = arguments[:count]
        first = tensors[0]
        if not first.is_cuda:
            return self.function[grid](*arguments, **constants)
        device = first.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(grid, *arguments, **constants)
        numbers = arguments[count:]
        addresses = [tensor.data_ptr() for tensor in tensors]
        dtypes = [tensor.dtype for tensor in tensors]
        key = (device, *dtypes, *numbers, *constants, *constants.values())
        launch = self._launches.get(key)
        aligned = reduce(or_, addresses) % _ALIGNMENT == 0
        if launch is None or not aligned or _is_watched():
            compiled = self.function[grid](*arguments, **constants)
            if aligned and torch.version.hip is None:
                self._remember(key, compiled, constants)
            return compiled
        run, function, metadata, rest = launch
        rows, columns, layers = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(
            rows, columns, layers, stream, function, metadata, None, None, None,
            *addresses, *numbers, *rest,
        )  # fmt: skip
        return None

    def _remember(self, key: Any, compiled: Any, constants: dict[str, Any]) -> None:
        if len(self._launches) >= _MOST_REMEMBERED:
            self._launches.clear()
        rest = [constants[name] for name in self.function.arg_names if name in constants]
        self._launches[key] = (
            compiled.run, compiled.function, compiled.packed_metadata, rest,
        )  # fmt: skip


def kernel(function: Any) -> Kernel:
    """Decorates a kernel that the host launches, above `triton.jit`."""
    return Kernel(function)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is for kernels, and costs the host ten times as much."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def _is_watched() -> bool:
    """Whether a profiler wants to hear of every launch."""
    hooks = triton.knobs.runtime
    return bool(_calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook))


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)
