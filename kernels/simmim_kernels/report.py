"""`python -m simmim_kernels.report`: what the Triton kernels compile to, without a GPU.

Every kernel launch of every case (an op on the tensors of a real model) is compiled ahead of time
for each target, and the machine code is read. Nothing is run:

- "compiled" figures are read from the machine code: registers, spills, shared memory, widths of
  global accesses, tensor-core opcodes, instructions; and occupancy, which follows from these.
- "modelled" figures are arithmetic: bytes moved, and those over the card's bandwidth. Kernel
  launches, caches and latency are not in the model, so the time is a floor and no forecast.

`--check golden.json` is the gate for CI, and `--export` writes PTX with the parameters of each
launch, so that anybody can replay it elsewhere.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import triton

    from simmim_kernels.ahead_of_time import TARGETS, Launch, capture
    from simmim_kernels.machine_code import Access, read_amdgcn, read_sass
    from simmim_kernels.report_cases import Case, cases
except ImportError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"the report needs Triton: {error} (`pip install triton`, Linux)") from error


@dataclass(frozen=True)
class Card:
    """A GPU of a target: data-sheet bandwidth and the limits of one multiprocessor.

    Sources: data sheets; CUDA C++ programming guide, table of technical specifications per compute
    capability; AMD CDNA 3 ISA and LLVM AMDGPU usage (gfx942).

    Attributes:
        name: the card.
        bandwidth: memory bandwidth in bytes per second.
        registers: 32-bit registers per multiprocessor (AMD: per lane of one SIMD).
        warps: most resident warps per multiprocessor (AMD: wavefronts per compute unit).
        programs: most resident programs (thread blocks) per multiprocessor.
        shared_bytes: shared memory per multiprocessor.
        shared_bytes_per_program: most shared memory of one program.
    """

    name: str
    bandwidth: float
    registers: int
    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int


CARDS = {
    "sm_80": Card("A100 80GB SXM", 2.039e12, 65536, 64, 32, 164 << 10, 163 << 10),
    "sm_90": Card("H100 SXM", 3.35e12, 65536, 64, 32, 228 << 10, 227 << 10),
    "sm_100": Card("B200", 8.0e12, 65536, 64, 32, 228 << 10, 227 << 10),
    "gfx942": Card("MI300X", 5.3e12, 512, 32, 16, 64 << 10, 64 << 10),
}

# Shared memory that every GPU since Ampere can give one program (RTX 30, 40 and 50 have the least).
SHARED_BYTES_EVERYWHERE = 99 << 10
LARGEST_BYTES_RATIO = 1.05
# Windows of more than 64 tokens with a bias: its gradient reads qkv and grad_out once more, since
# no program can hold all of its sums.
LARGEST_OF_TILED_BIAS = 1.37
LARGEST_GROWTH = 1.10
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


def occupancy(target: str, registers: int, num_warps: int, shared_bytes: int) -> float:
    """Resident warps over the most possible; 0 where the launch would fail."""
    card = CARDS[target]
    if shared_bytes > card.shared_bytes_per_program:
        return 0.0
    if target.startswith("gfx"):  # registers come in eights, per wavefront and SIMD (four of them)
        by_registers = 4 * (card.registers // _round_up(max(registers, 1), 8)) // num_warps
        by_shared = card.shared_bytes // max(shared_bytes, 1)
    else:  # 256 registers at a time, per warp; 1 KiB of shared memory is the system's
        warps = card.registers // _round_up(32 * max(registers, 1), 256)
        by_registers = warps // 4 * 4 // num_warps
        by_shared = card.shared_bytes // _round_up(shared_bytes + 1024, 128)
    programs = min(card.warps // num_warps, card.programs, by_registers, by_shared)
    return programs * num_warps / card.warps


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed nothing to read: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def amd_resources(text: str) -> tuple[int, int]:
    """Registers per lane and bytes spilled per lane, from the metadata in AMD assembly."""

    def entry(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"no .{key} in the AMD assembly")
        return int(found[1])

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


def as_table(figures: Sequence[CaseFigures]) -> str:
    """The figures for people."""
    lines = [f"simmim_kernels, triton {triton.__version__}: {NOT_MEASURED}"]
    by_case: dict[str, list[CaseFigures]] = {}
    for one in figures:
        by_case.setdefault(one.case, []).append(one)
    for name, targets in by_case.items():
        rows = [HEADER]
        rows += [_row(one.target, launch) for one in targets for launch in one.launches]
        lines += ["", name, "  compiled:", *_aligned(rows), "  modelled:"]
        lines += [_traffic_line(one) for one in targets]
    return "\n".join(lines)


HEADER = (
    "target kernel grid warps regs spill shared occupancy load store tensor atomic instr".split()
)


def _row(target: str, launch: KernelFigures) -> list[str]:
    tensor_ops = ",".join(sorted({op.split(".")[0] for op in launch.tensor_ops})) or "-"
    return [
        target,
        launch.kernel,
        "x".join(str(n) for n in launch.grid),
        str(launch.num_warps),
        str(launch.registers),
        f"{launch.spill_bytes}B",
        f"{launch.shared_bytes}B",
        f"{launch.occupancy:.2f}",
        _widths(launch.loads),
        _widths(launch.stores),
        tensor_ops,
        str(launch.atomics),
        str(launch.instructions),
    ]


def _widths(access: Access) -> str:
    """Narrowest width on the hot path, and instructions of each width: "16B(16:8,1:2)"."""
    if not access.widths:
        return "-"
    counts = ",".join(f"{w}:{n}" for w, n in sorted(access.widths.items(), reverse=True))
    return f"{access.narrowest}B({counts})"


def _traffic_line(one: CaseFigures) -> str:
    card = CARDS[one.target]
    return (
        f"    {one.target}: {one.bytes_moved / 1e6:.3f} MB moved, {one.bytes_ratio:.2f} of the "
        f"fewest possible; {one.modelled_us:.2f} us at {card.bandwidth / 1e12:.2f} TB/s "
        f"({card.name})"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["    " + "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]


def as_json(figures: Sequence[CaseFigures]) -> str:
    """The figures for machines; a golden file is this."""
    content = {
        "label": NOT_MEASURED,
        "triton": triton.__version__,
        "cases": [asdict(one) for one in figures],
    }
    return json.dumps(content, indent=1) + "\n"


def largest_bytes_ratio(case: str) -> float:
    """How many times the fewest bytes a case may move."""
    tiled = ("window_attention/swin_large_192_w12", "window_attention/swinv2_base_192_w12/")
    tiled_bias = case.startswith(tiled)
    return LARGEST_OF_TILED_BIAS if tiled_bias else LARGEST_BYTES_RATIO


def differences(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is wrong with the figures, in absolute terms or against the golden ones (as as_json).

    Golden figures of an op or a target that is not reported now at all are left alone: the caller
    may have chosen some.
    """
    known = {(one["case"], one["target"]): one for one in golden["cases"]}
    reported = {(one["case"], one["target"]) for one in now["cases"]}
    ops, targets = {_op(case) for case, _ in reported}, {target for _, target in reported}
    found = [
        f"{case} {target}: in the golden file, and no longer reported"
        for case, target in known
        if (case, target) not in reported and _op(case) in ops and target in targets
    ]
    for one in now["cases"]:
        name = f"{one['case']} {one['target']}"
        expected = known.get((one["case"], one["target"]))
        if one["bytes_ratio"] > largest_bytes_ratio(one["case"]):
            found.append(f"{name}: moves {one['bytes_ratio']:.3f} of the fewest bytes possible")
        kernels = [launch["kernel"] for launch in one["launches"]]
        if expected is None:
            found.append(f"{name}: not in the golden file")
        elif kernels != (before := [launch["kernel"] for launch in expected["launches"]]):
            found.append(f"{name}: launches {', '.join(kernels)}; golden {', '.join(before)}")
            expected = None
        for i, launch in enumerate(one["launches"]):
            where = f"{name} {launch['kernel']}"
            found += [f"{where}: {problem}" for problem in _unacceptable(launch)]
            if expected is not None:
                worse = _worse(expected["launches"][i], launch)
                found += [f"{where}: {problem}" for problem in worse]
    return found


def _op(case_name: str) -> str:
    return case_name.split("/")[0]


def _unacceptable(launch: dict[str, Any]) -> list[str]:
    """Problems of one launch that no golden file excuses."""
    found = []
    if launch["spill_bytes"] > 0:
        found.append(f"spills {launch['spill_bytes']} bytes per thread")
    if launch["shared_bytes"] > SHARED_BYTES_EVERYWHERE:
        found.append(
            f"{launch['shared_bytes']} bytes of shared memory, more than the "
            f"{SHARED_BYTES_EVERYWHERE} that every GPU has"
        )
    return found


def _worse(golden: dict[str, Any], launch: dict[str, Any]) -> list[str]:
    """What got worse in one launch."""
    found = []
    for kind in ("loads", "stores"):
        before, after = golden[kind]["narrowest"], launch[kind]["narrowest"]
        if 0 < after < before:
            found.append(f"{kind} of {after} bytes on the hot path, golden {before}")
    for kind in ("registers", "instructions"):
        before, after = golden[kind], launch[kind]
        if after > LARGEST_GROWTH * before:
            found.append(f"{after} {kind}, golden {before} ({after / before - 1:+.0%})")
    return found


def export(launches: Sequence[Launch], case: Case, target: str, folder: Path) -> None:
    """Writes the assembly of each launch, and next to it what is needed to replay it (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, launch in enumerate(launches):
        stem = f"{case.name.replace('/', '-')}-{target}-{index}-{launch.kernel}"
        kind = "ptx" if "ptx" in launch.compiled.asm else "amdgcn"
        (folder / f"{stem}.{kind}").write_text(launch.compiled.asm[kind])
        content = json.dumps(_replay_parameters(launch), indent=1)
        (folder / f"{stem}.json").write_text(content + "\n")


def _replay_parameters(launch: Launch) -> dict[str, Any]:
    arguments: list[dict[str, Any]] = []
    tensors = iter(launch.tensors)
    storages: dict[int, int] = {}  # numbered: an address of this process says nothing elsewhere
    named = zip(launch.argument_names, launch.argument_types, launch.arguments)
    for name, kind, value in named:
        if not kind.startswith("*"):
            arguments.append({"name": name, "type": kind, "value": value})
            continue
        tensor = next(tensors)
        storage = tensor.untyped_storage()
        arguments.append(
            {
                "name": name,
                "type": kind,
                "shape": list(tensor.shape),
                "strides": list(tensor.stride()),
                "storage": storages.setdefault(storage.data_ptr(), len(storages)),
                "storage_bytes": storage.nbytes(),
                "byte_offset": tensor.storage_offset() * tensor.element_size(),
            }
        )
    return {
        "label": NOT_MEASURED,
        "kernel": launch.kernel,
        "target": launch.target,
        "grid": launch.grid,
        "threads": launch.num_warps * TARGETS[launch.target].warp_size,
        "shared_bytes": launch.shared_bytes,
        "constants": {name: repr(value) for name, value in launch.constants.items()},
        "arguments": arguments,
        "after_the_arguments": "two pointers to scratch memory that the kernels do not use: null",
    }


def _parser(ops: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simmim_kernels.report",
        description=f"What the Triton kernels compile to; {NOT_MEASURED}.",
    )
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write figures here, or print them"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="write PTX and parameters here")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with golden figures; 1 if worse"
    )
    return parser


def main(arguments: Sequence[str] | None = None, known: "Sequence[Case] | None" = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: of the command line; None takes the process's.
        known: the cases to choose from; None takes `cases()`.
    """
    known = cases() if known is None else known
    parser = _parser(sorted({case.op for case in known}))
    options = parser.parse_args(arguments)
    golden = None
    if options.check is not None:
        try:
            golden = json.loads(options.check.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--check {options.check}: {error}")
    figures = []
    for case in known:
        if case.op not in options.op:
            continue
        for target in options.target:
            launches = compile_case(case, target)
            figures.append(case_figures(case, target, launches))
            if options.export:
                export(launches, case, target, options.export)
    content = as_json(figures)
    print(content if options.json == "-" else as_table(figures))
    if options.json not in (None, "-"):
        Path(options.json).write_text(content)
    if golden is None:
        return 0
    problems = differences(golden, json.loads(content))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and golden["triton"] != triton.__version__:
        versions = f"{golden['triton']}, and this is {triton.__version__}"
        print(f"The golden file is from triton {versions}.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
