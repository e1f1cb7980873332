"""Compiles Triton kernels for GPUs that this machine does not have, by launching them as usual.

    with capture("sm_90") as launches:
        triton_kernel.forward(torch.empty(64, 2304, 128, dtype=torch.bfloat16), ...)
    print(launches[0].compiled.asm["ptx"])

The launch functions run unchanged, on CPU tensors of the real shapes (`torch.empty` costs address
space only); `kernel[grid](...)` compiles the kernel and records the launch instead of running it.
It goes through Triton's own launch path, so that alignment of pointers, divisibility of sizes by 16
and arguments equal to 1 specialise the kernel exactly as they would on the GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, compiled and not run.

    Attributes:
        kernel: name of the kernel, which is also its entry point in the PTX.
        target: a key of TARGETS.
        grid: number of programs along x, y and z.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline that the compiler was asked for.
        shared_bytes: shared memory of one program, allocated at launch.
        compiled: `compiled.asm` holds "ptx" and "cubin", or "amdgcn" and "hsaco", as well as
            Triton's own stages.
        constants: values that are compiled into the kernel: constexpr, None, integers equal to 1.
        argument_names: names of the runtime parameters, in the order of the entry point's.
        argument_types: Triton's types of these, such as "*bf16", "i32" or "fp32".
        arguments: their values; a tensor is the address of its first element. The pointers to
            scratch memory that Triton adds at the end are left out: no kernel of ours uses them.
        tensors: the tensors among the arguments, in order. They keep the addresses valid.
    """

    kernel: str
    target: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared_bytes: int
    compiled: CompiledKernel
    constants: dict[str, Any]
    argument_names: list[str]
    argument_types: list[str]
    arguments: list[int | float]
    tensors: list[Tensor]


class _OfflineDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Key of the kernels' caches: no index of a real device, whose kernels are loaded and run.
        return f"ahead of time, {self.target}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def capture(
    target: str, on_launch: Callable[[Launch], None] | None = None
) -> Iterator[list[Launch]]:
    """Inside, every `kernel[grid](...)` is compiled for `target` and recorded instead of run.

    Args:
        target: a key of TARGETS.
        on_launch: called with each launch where it would run, so that an emulator can execute it on
            the tensors before the next one.

    Yields:
        The launches, in order; the list grows while the block runs.

    Raises:
        ValueError: unknown target.
        RuntimeError: Triton is interpreting, or another capture is active.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    compile_and_run = JITFunction.run
    if triton.knobs.runtime.interpret or compile_and_run.__module__ != JITFunction.__module__:
        raise RuntimeError("capture() works neither in Triton's interpreter nor inside itself")
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        compiled = compile_and_run(kernel, *args, grid=grid, warmup=True, **options)
        if not warmup:
            launches.append(_record(kernel, compiled, target, grid, args, options))
            if on_launch is not None:
                on_launch(launches[-1])
        return compiled

    # `driver.active` would look for a GPU, and `reset_active` too.
    active_before = driver._active
    driver._active = _OfflineDriver(TARGETS[target])
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = compile_and_run
        driver._active = active_before


def _record(
    kernel: Any,
    compiled: CompiledKernel,
    target: str,
    grid: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Launch:
    parameters = {name: value for name, value in options.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **parameters)
    bound.apply_defaults()
    values: dict[str, Any] = dict(bound.arguments)
    if callable(grid):
        grid = grid(values)
    types = compiled.src.signature  # as specialised: what is compiled in has type "constexpr"
    names = [name for name in values if types[name] != "constexpr"]
    x, y, z = (int(n) for n in (*grid, 1, 1)[:3])
    return Launch(
        kernel=kernel.__name__,
        target=target,
        grid=(x, y, z),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        shared_bytes=compiled.metadata.shared,
        compiled=compiled,
        constants={name: value for name, value in values.items() if name not in names},
        argument_names=names,
        argument_types=[types[name] for name in names],
        arguments=[_machine_value(name, values[name]) for name in names],
        tensors=[values[name] for name in names if isinstance(values[name], Tensor)],
    )


def _machine_value(name: str, value: Any) -> int | float:
    """What the launch would hand to the GPU for one parameter."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return value
    if isinstance(value, int):
        return int(value)  # a bool is 0 or 1
    raise TypeError(f"parameter {name}: capture() does not know how to pass a {type(value)}")
