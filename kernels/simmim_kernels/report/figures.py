"""What a case compiles to, read from the machine code, and the bytes that it moves."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from simmim_kernels.report.ahead_of_time import Launch, capture
from simmim_kernels.report.cards import CARDS, occupancy
from simmim_kernels.report.cases import Case
from simmim_kernels.report.machine_code import Access, read_amdgcn, read_sass

NOT_MEASURED = "compiled ahead of time and modelled, not run on a GPU"


@dataclass(frozen=True)
class KernelFigures:
    """What one launch compiles to.

    Attributes:
        kernel: its name.
        grid: programs along x, y, z.
        num_warps: warps (AMD: wavefronts) per program.
        registers: per thread (AMD: vector registers, accumulation registers included).
        spill_bytes: local memory of one thread; our kernels have no other use for it.
        shared_bytes: shared memory per program.
        occupancy: resident warps over the most that the card can hold.
        loads: global loads.
        stores: global stores.
        tensor_ops: tensor-core instructions by opcode.
        atomics: atomic instructions on global memory.
        instructions: static number of instructions.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    loads: Access
    stores: Access
    tensor_ops: dict[str, int]
    atomics: int
    instructions: int


@dataclass(frozen=True)
class CaseFigures:
    """A case compiled for one target.

    Attributes:
        case: its name, op/model/dtype.
        target: a key of TARGETS.
        launches: compiled figures of each launch, in order.
        bytes_needed: the fewest bytes possible.
        bytes_moved: modelled.
        bytes_ratio: bytes_moved over bytes_needed.
        modelled_us: bytes_moved at the card's data-sheet bandwidth.
    """

    case: str
    target: str
    launches: list[KernelFigures]
    bytes_needed: int
    bytes_moved: int
    bytes_ratio: float
    modelled_us: float


def kernel_figures(launch: Launch) -> KernelFigures:
    """Reads the machine code of one launch."""
    if "cubin" in launch.compiled.asm:
        registers, spill_bytes = _nvidia_resources(launch)
        code = read_sass(_run_tool("nvdisasm", launch, "-c"))
    else:
        text = launch.compiled.asm["amdgcn"]
        registers, spill_bytes = amd_resources(text)
        code = read_amdgcn(text)
    return KernelFigures(
        kernel=launch.kernel,
        grid=launch.grid,
        num_warps=launch.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=launch.shared_bytes,
        occupancy=occupancy(launch.target, registers, launch.num_warps, launch.shared_bytes),
        **vars(code),
    )


def _run_tool(tool: str, launch: Launch, *options: str) -> str:
    """Output of one of the CUDA tools that come with Triton, on the kernel's binary."""
    path = getattr(triton.knobs.nvidia, tool).path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(launch.compiled.asm["cubin"])
        command = [path, *options, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_resources(launch: Launch) -> tuple[int, int]:
    usage = _run_tool("cuobjdump", launch, "-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage printed nothing to read: {usage!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


def amd_resources(text: str) -> tuple[int, int]:
    """Registers per lane and bytes spilled per lane, from the metadata in AMD assembly."""

    def entry(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", text)
        if match is None:
            raise RuntimeError(f"no .{key} in the AMD assembly")
        return int(match[1])

    return entry("vgpr_count"), max(
        entry("private_segment_fixed_size"), 4 * entry("vgpr_spill_count")
    )


def case_figures(case: Case, target: str, launches: Sequence[Launch]) -> CaseFigures:
    """Figures of a case from its launches for one target."""
    moved = case.bytes_moved
    if moved is None:
        moved = sum(_bytes_given(launch) for launch in launches)
    return CaseFigures(
        case=case.name,
        target=target,
        launches=[kernel_figures(launch) for launch in launches],
        bytes_needed=case.bytes_needed,
        bytes_moved=moved,
        bytes_ratio=round(moved / case.bytes_needed, 4),
        modelled_us=round(moved / CARDS[target].bandwidth * 1e6, 2),
    )


def _bytes_given(launch: Launch) -> int:
    """Bytes of the tensors that a launch is given, each once."""
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in launch.tensors}
    return sum(sizes.values())


def compile_case(case: Case, target: str) -> list[Launch]:
    """All launches of a case, compiled for a target.

    Raises:
        RuntimeError: nothing was launched, so that there is nothing to report.
    """
    with capture(target) as launches:
        try:
            case.make()
        except Exception as error:
            error.add_note(f"while compiling {case.name} for {target}")
            raise
    if not launches:
        raise RuntimeError(f"{case.name}: make() launched no Triton kernel")
    return launches
