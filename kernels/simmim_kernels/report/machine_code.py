"""Reads what a report needs from the assembly of NVIDIA (SASS) and AMD (gfx9) kernels."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """Instructions that access global memory, counted by width in bytes.

    Attributes:
        widths: instructions per width, everywhere in the kernel.
        narrowest: the narrowest width that carries at least a quarter of the bytes on the hot path,
            which is the loops if there is an access in one and else the whole kernel; 0 without
            any access. Flags and other scalars, which are few, do not count this way.
    """

    widths: dict[int, int]
    narrowest: int


@dataclass(frozen=True)
class MachineCode:
    """What is read from the code of one kernel."""

    loads: Access
    stores: Access
    tensor_ops: dict[str, int]
    atomics: int
    instructions: int


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: str


def read_sass(text: str) -> MachineCode:
    """Reads NVIDIA machine code as `nvdisasm -c` prints it."""
    instructions, labels = _parse(
        text,
        re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)"),
        re.compile(r"(\.L_x_\d+):"),
    )
    return _summarise(
        instructions,
        labels,
        load=lambda opcode: _sass_width(opcode, "LDG", "LDGSTS"),
        store=lambda opcode: _sass_width(opcode, "STG"),
        is_branch=lambda opcode: opcode.startswith("BRA"),
        is_tensor_op=lambda opcode: opcode.split(".")[0].endswith("MMA"),
        is_atomic=lambda opcode: opcode.split(".")[0] in ("RED", "REDG", "ATOM", "ATOMG"),
    )


def _sass_width(opcode: str, *bases: str) -> int | None:
    """Bytes that a lane accesses, None for other instructions: LDG.E.128 is 16, LDG.E.U16 2."""
    base, *suffixes = opcode.split(".")
    if base not in bases:
        return None
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits[s] // 8 for s in suffixes if s in bits), 4)


def read_amdgcn(text: str) -> MachineCode:
    """Reads AMD assembly as Triton keeps it."""
    instructions, labels = _parse(
        text,
        re.compile(r"\s+((?:[vs]_|ds_|buffer_|global_|flat_|scratch_)\w+)(.*)"),
        re.compile(r"(\.LBB\w+):"),
    )
    return _summarise(
        instructions,
        labels,
        load=lambda opcode: _amdgcn_width(opcode, "load"),
        store=lambda opcode: _amdgcn_width(opcode, "store"),
        is_branch=lambda opcode: opcode.startswith(("s_branch", "s_cbranch")),
        is_tensor_op=lambda opcode: opcode.startswith("v_mfma"),
        is_atomic=lambda opcode: re.match(r"(?:global|buffer|flat)_atomic", opcode) is not None,
    )


def _amdgcn_width(opcode: str, direction: str) -> int | None:
    match = re.fullmatch(rf"(?:global|buffer|flat)_{direction}_(\w+)", opcode)
    if match is None:
        return None
    words = re.match(r"dwordx?(\d?)", match[1])
    if words:
        return 4 * int(words[1] or 1)
    return 1 if "byte" in match[1] else 2


def _parse(
    text: str, instruction: re.Pattern[str], label: re.Pattern[str]
) -> tuple[list[_Instruction], dict[str, int]]:
    """Instructions in order, and the index of the instruction after each label."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := label.match(line):
            labels[match[1]] = len(instructions)
        elif match := instruction.match(line):
            instructions.append(_Instruction(match[1], match[2]))
    return instructions, labels


def _summarise(
    parsed: list[_Instruction],
    labels: dict[str, int],
    *,
    load: Callable[[str], int | None],
    store: Callable[[str], int | None],
    is_branch: Callable[[str], bool],
    is_tensor_op: Callable[[str], bool],
    is_atomic: Callable[[str], bool],
) -> MachineCode:
    in_loop = _in_loops(parsed, labels, is_branch)
    opcodes = [(i.opcode, looped) for i, looped in zip(parsed, in_loop) if i.opcode != "NOP"]
    return MachineCode(
        loads=_access((load(opcode), looped) for opcode, looped in opcodes),
        stores=_access((store(opcode), looped) for opcode, looped in opcodes),
        tensor_ops=dict(Counter(opcode for opcode, _ in opcodes if is_tensor_op(opcode))),
        atomics=sum(is_atomic(opcode) for opcode, _ in opcodes),
        instructions=len(opcodes),
    )


def _in_loops(
    instructions: Sequence[_Instruction],
    labels: dict[str, int],
    is_branch: Callable[[str], bool],
) -> list[bool]:
    """For each instruction, whether a branch back to before it follows it."""
    looped = [False] * len(instructions)
    for index, instruction in enumerate(instructions):
        if not is_branch(instruction.opcode):
            continue
        target = re.search(r"\.L[\w]+", instruction.operands)
        start = labels.get(target[0], index) if target else index
        looped[start:index] = [True] * max(0, index - start)
    return looped


def _access(widths_and_loops: Iterable[tuple[int | None, bool]]) -> Access:
    everywhere: Counter[int] = Counter()
    in_loops: Counter[int] = Counter()
    for width, looped in widths_and_loops:
        if width is not None:
            everywhere[width] += 1
            in_loops[width] += looped
    hot = {w: n for w, n in in_loops.items() if n} or dict(everywhere)
    hot_bytes = sum(w * n for w, n in hot.items())
    narrowest = min((w for w, n in hot.items() if 4 * w * n >= hot_bytes), default=0)
    return Access(dict(sorted(everywhere.items())), narrowest)
