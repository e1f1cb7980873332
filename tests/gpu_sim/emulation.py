"""Runs the compiled PTX of Triton kernels on CPU tensors, launch by launch.

    with emulate("sm_90", seed=3) as counters:
        triton_kernel.forward(tensor, ...)   # kernel[grid](...) is compiled, then emulated

Each launch goes through Triton's own launch path (`simmim_kernels.report.ahead_of_time`), and the
PTX that comes out reads and writes the tensors' own memory. Label of what this proves: "emulated",
by our own reading of the PTX ISA, not by hardware.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from gpu_sim.ptx_emulator import Counters, Program, run
from simmim_kernels.report.ahead_of_time import Launch, capture


def execute(launch: Launch, program: Program, seed: int | None) -> Counters:
    """Runs a program with the grid, the arguments and the tensors of a launch.

    Args:
        program: what the launch compiled to, or a mutation of that.
        seed: of the random warp scheduler; None runs the warps in order.
    """
    memories = {t.untyped_storage().data_ptr(): _memory(t) for t in launch.tensors}
    return run(
        program,
        launch.grid,
        launch.arguments,
        [memory for memory in memories.values() if memory.size],
        shared_bytes=launch.shared_bytes,
        seed=seed,
    )


@cache
def _program(ptx: str) -> Program:
    return Program.parse(ptx)


def _memory(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage of a tensor as bytes, shared and not copied."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


@contextmanager
def emulate(
    target: str, *, seed: int | None = 0, mutate: Callable[[Launch, str], str] | None = None
) -> Iterator[list[tuple[Launch, Counters]]]:
    """Inside, every Triton kernel is compiled for `target` and its PTX run on CPU tensors.

    Args:
        target: "sm_80" or "sm_90".
        seed: of the random warp scheduler; None runs the warps in order.
        mutate: changes the PTX of a launch before it runs, to see whether that is noticed.
    """
    done: list[tuple[Launch, Counters]] = []

    def emulate_launch(launch: Launch) -> None:
        ptx = launch.compiled.asm["ptx"]
        if mutate is not None:
            ptx = mutate(launch, ptx)
        done.append((launch, execute(launch, _program(ptx), seed)))

    with capture(target, on_launch=emulate_launch):
        yield done
