"""Runs compiled PTX without a GPU, so that kernels can be checked after Triton has lowered them.

It executes what Triton 3.8.0 emits for sm_80 and sm_90, by our own reading of the PTX ISA 8.8; no
result has been compared with hardware. It is made to find mistakes rather than to forgive them:

- every global access must lie inside one of the given arrays and be aligned;
- registers, shared and local memory start as NaN, and a predicate nobody wrote is an error;
- a random scheduler (`seed`) lets warps run far ahead of each other, up to the next barrier;
- what cp.async copies arrives at the wait and not before, and its target is NaN until then;
- what wgmma computes arrives at the wait, and its operands may not change before;
- an instruction that is not known exactly raises NotImplementedError.

Not modelled: time, memory ordering between CTAs (they run one after the other), the proxy fence
and wgmma.fence, the hardware's approximations (ex2.approx and its like round correctly here) and
the order in which it sums.
"""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gpu_sim import (  # noqa: F401, they register decoders
    ptx_arithmetic,
    ptx_bits,
    ptx_conversions,
    ptx_matrix,
    ptx_transfers,
)
from gpu_sim.ptx_machine import Array, Counters, Cta, Fragment, GlobalMemory, SharedMemory, Warp
from gpu_sim.ptx_operands import DECODERS, TYPES, U32, Execute, Read, predicate_reader, reader
from gpu_sim.ptx_parser import Listing, Statement, parse_listing

__all__ = ["Counters", "Program", "run"]

# A loop that a broken kernel never leaves must not hang the tests.
MAX_WARP_INSTRUCTIONS = 5_000_000

# Opcodes at which the lanes of a warp meet; until all are there the others go first.
_MEETING_OPCODES = frozenset(
    "bar barrier shfl vote redux elect mma wgmma ldmatrix stmatrix".split()
)


@dataclass(frozen=True)
class _Barrier:
    """bar.sync or bar.arrive: the barrier's number, and how many threads it waits for."""

    read_name: Read
    read_num_threads: Read | None
    waits: bool


@dataclass(frozen=True)
class Instruction:
    """A decoded statement: just one of `execute`, `target`, `barrier` and `leaves` is set."""

    statement: Statement
    guard: Read | None
    execute: Execute | None = None
    target: int | None = None
    barrier: _Barrier | None = None
    leaves: bool = False
    meets: bool = False


def _decode_barrier(statement: Statement) -> _Barrier | None:
    modifiers = [m for m in statement.modifiers if m not in ("cta", "aligned")]
    if modifiers == ["warp", "sync"]:
        return None
    if modifiers not in (["sync"], ["arrive"]) or not 1 <= len(statement.operands) <= 2:
        raise statement.unsupported()
    reads = [reader(statement, operand, U32) for operand in statement.operands]
    if modifiers == ["arrive"] and len(reads) == 1:
        raise statement.unsupported("number of threads")
    return _Barrier(reads[0], reads[1] if len(reads) == 2 else None, modifiers == ["sync"])


def _decode(statement: Statement, labels: dict[str, int]) -> Instruction:
    guard = None
    if statement.guard is not None:
        guard = predicate_reader(statement, statement.guard)
        if statement.guard_negated:
            read = guard
            guard = lambda warp: ~read(warp)  # noqa: E731
    meets = statement.opcode in _MEETING_OPCODES
    if statement.opcode == "bra":
        label = statement.operands[0]
        if statement.modifiers not in ((), ("uni",)) or label not in labels:
            raise statement.unsupported()
        return Instruction(statement, guard, target=labels[str(label)])
    if statement.opcode in ("ret", "exit"):
        return Instruction(statement, guard, leaves=True)
    if statement.opcode in ("bar", "barrier"):
        barrier = _decode_barrier(statement)
        if barrier is not None:
            return Instruction(statement, guard, barrier=barrier, meets=True)
        return Instruction(statement, guard, execute=lambda warp, mask: None, meets=True)
    if statement.opcode not in DECODERS:
        raise statement.unsupported()
    try:
        return Instruction(
            statement, guard, execute=DECODERS[statement.opcode](statement), meets=meets
        )
    except (ValueError, IndexError) as error:
        raise statement.unsupported(str(error)) from error


@dataclass
class Program:
    """A kernel, parsed and decoded once; run it with `run`.

    `parameters` are (type, name) in PTX order, Triton's trailing scratch pointers included;
    `num_threads` is the block's size.
    """

    name: str
    parameters: list[tuple[str, str]]
    num_threads: int
    instructions: list[Instruction]
    labels: dict[str, int]
    listing: Listing

    @classmethod
    def parse(cls, ptx: str) -> "Program":
        """Parses a PTX module with one kernel.

        Raises:
            NotImplementedError: An instruction that the emulator does not know, with its line.
            ValueError: No kernel in the text.
        """
        listing = parse_listing(ptx)
        instructions = [_decode(statement, listing.labels) for statement in listing.statements]
        end = Statement("exit", (), (), None, False, 0, "end of the kernel")
        instructions.append(Instruction(end, None, leaves=True))
        return cls(
            listing.name,
            listing.parameters,
            listing.num_threads,
            instructions,
            listing.labels,
            listing,
        )


def run(
    program: Program,
    grid: tuple[int, ...],
    arguments: Sequence[int | float],
    buffers: Sequence[Array],
    *,
    shared_bytes: int,
    seed: int | None = 0,
) -> Counters:
    """Executes a kernel on arrays in host memory, one CTA after the other.

    Args:
        program: What to run.
        grid: The number of CTAs in x, and in y and z where given.
        arguments: Kernel parameters in PTX order; pointers are host addresses (`array.ctypes.data`
            or `tensor.data_ptr()`), parameters left out at the end are 0.
        buffers: Contiguous arrays that the kernel may touch, changed in place.
        shared_bytes: The dynamic shared memory, `kernel.metadata.shared`.
        seed: Of the order in which warps run; None runs them in lock step.

    Returns:
        What was executed and transferred, summed over the CTAs.

    Raises:
        MemoryError: An access outside every buffer, or misaligned, with line, CTA and lanes.
        RuntimeError: Divergence at a barrier or another instruction that needs the whole warp, a
            barrier that nobody can leave, or a kernel that does not end.
    """
    listing = program.listing
    memory = GlobalMemory(buffers, listing.constants)
    shared = SharedMemory(listing.static_shared_bytes + shared_bytes)
    counters = Counters()
    parameters = _parameter_bits(program, arguments)
    warps = [Warp(index, listing) for index in range(program.num_threads // 32)]
    sizes = (*grid, 1, 1)[:3]
    constants = {f"%ntid.{axis}": 1 for axis in "yz"} | {f"%tid.{axis}": 0 for axis in "yz"}
    constants["%ntid.x"] = program.num_threads
    constants |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", sizes)}
    constants["%nwarpid"] = len(warps)
    with np.errstate(all="ignore"):
        for number, (z, y, x) in enumerate(product(*map(range, reversed(sizes)))):
            shared.poison()
            cta = Cta((x, y, z), memory, shared, counters, parameters)
            for warp in warps:
                place = {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
                warp.start(cta, constants | place)
            _Scheduler(program, warps, None if seed is None else seed * 1_000_003 + number).run()
    return counters


def _parameter_bits(program: Program, arguments: Sequence[int | float]) -> dict[str, int]:
    if len(arguments) > len(program.parameters):
        raise ValueError(
            f"{program.name} has {len(program.parameters)} parameters, "
            f"got {len(arguments)} arguments"
        )
    given = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    bits = {}
    for (type_name, name), value in zip(program.parameters, given):
        width = TYPES[type_name].bits
        if TYPES[type_name].is_float:
            value = int.from_bytes(np.array(value, f"f{width // 8}").tobytes(), "little")
        value = operator.index(value)  # a float for an integer parameter is a mistake
        if not -(1 << (width - 1)) <= value < 1 << width:
            raise ValueError(f"argument {value} does not fit .{type_name} {name}")
        bits[name] = value % (1 << width)
    return bits


class _Scheduler:
    """Runs the warps of one CTA to their end."""

    def __init__(self, program: Program, warps: list[Warp], seed: int | None) -> None:
        self._program = program
        self._instructions = program.instructions
        self._warps = warps
        self._random = None if seed is None else random.Random(seed)
        # Arrivals per barrier number: the warps, and the number of threads that it waits for.
        self._arrived: dict[int, list[Warp]] = {}
        self._expected: dict[int, int] = {}
        self._executed = 0

    def run(self) -> None:
        while True:
            ready = [w for w in self._warps if w.fragments and w.barrier is None]
            if not ready:
                break
            if self._random is None:
                for warp in ready:
                    self._advance(warp, 1)
            else:
                # From one instruction up to far beyond the others, on a logarithmic scale.
                self._advance(self._random.choice(ready), 1 << self._random.randrange(11))
            if self._executed > MAX_WARP_INSTRUCTIONS:
                raise RuntimeError(f"{self._program.name} does not end: {self._here(self._warps)}")
        if any(warp.fragments for warp in self._warps):
            raise RuntimeError(f"divergent barrier, never complete: {self._here(self._warps)}")
        self._warps[0].cta.counters.warp_instructions += self._executed

    def _here(self, warps: list[Warp]) -> str:
        where = [
            f"warp {w.index} at {self._instructions[w.fragments[0].pc].statement}"
            if w.fragments
            else f"warp {w.index} has left"
            for w in warps
        ]
        return f"CTA {warps[0].cta.index}; " + "; ".join(where)

    def _next_fragment(self, warp: Warp) -> Fragment:
        """The lanes to run: lowest pc first, but those that wait for the others go last."""
        fragments = warp.fragments
        if len(fragments) == 1:
            return fragments[0]
        moving = [f for f in fragments if not self._instructions[f.pc].meets]
        return min(moving or fragments, key=lambda f: f.pc)

    def _advance(self, warp: Warp, quantum: int) -> None:
        instructions = self._instructions
        for _ in range(quantum):
            fragment = self._next_fragment(warp)
            instruction = instructions[fragment.pc]
            self._executed += 1
            mask = fragment.lanes
            if instruction.guard is not None:
                chosen = instruction.guard(warp)
                mask = chosen if mask is None else mask & chosen
                if not mask.any():
                    self._move(warp, fragment, fragment.pc + 1)
                    continue
                if mask.all():
                    mask = None
            if instruction.execute is not None:
                instruction.execute(warp, mask)
                fragment.pc += 1
                if len(warp.fragments) > 1:
                    self._merge(warp)
            elif instruction.barrier is not None:
                self._arrive(warp, fragment, mask, instruction)
                if warp.barrier is not None:
                    return
            else:
                self._branch(warp, fragment, mask, instruction)
                if not warp.fragments:
                    return

    def _move(self, warp: Warp, fragment: Fragment, pc: int) -> None:
        fragment.pc = pc
        if len(warp.fragments) > 1:
            self._merge(warp)

    @staticmethod
    def _merge(warp: Warp) -> None:
        """Joins lanes that have come to the same instruction."""
        joined: dict[int, Fragment] = {}
        for fragment in warp.fragments:
            other = joined.setdefault(fragment.pc, fragment)
            if other is not fragment and other.lanes is not None and fragment.lanes is not None:
                lanes = other.lanes | fragment.lanes
                other.lanes = None if lanes.all() else lanes
        warp.fragments = list(joined.values())

    def _branch(
        self, warp: Warp, fragment: Fragment, mask: Array | None, instruction: Instruction
    ) -> None:
        """Splits off the lanes that branch or leave."""
        lanes = np.ones(32, bool) if fragment.lanes is None else fragment.lanes
        # A copy, for the mask may be the guard's register, which the lanes will write again.
        chosen = (lanes if mask is None else mask).copy()
        staying = lanes & ~chosen
        warp.fragments.remove(fragment)
        if staying.any():
            warp.fragments.append(Fragment(fragment.pc + 1, staying))
        if instruction.leaves:
            live = np.ones(32, bool) if warp.live is None else warp.live
            warp.live = live & ~chosen
        else:
            assert instruction.target is not None
            split = fragment.lanes if not staying.any() else chosen
            warp.fragments.append(Fragment(instruction.target, split))
        self._merge(warp)

    def _arrive(
        self, warp: Warp, fragment: Fragment, mask: Array | None, instruction: Instruction
    ) -> None:
        # Lanes that left do not arrive either: PTX wants all threads of the warp.
        if fragment.lanes is not None or mask is not None:
            raise RuntimeError(
                f"divergent barrier: only some lanes of warp {warp.index} arrive; "
                f"{instruction.statement}; CTA {warp.cta.index}"
            )
        barrier = instruction.barrier
        assert barrier is not None
        name = int(barrier.read_name(warp)[0])
        expected = self._program.num_threads
        if barrier.read_num_threads is not None:
            expected = int(barrier.read_num_threads(warp)[0])
        if self._expected.setdefault(name, expected) != expected or expected % 32:
            raise RuntimeError(f"barrier {name} for {expected} threads: {instruction.statement}")
        fragment.pc += 1
        arrived = self._arrived.setdefault(name, [])
        arrived.append(warp)
        if barrier.waits:
            warp.barrier = name
        if 32 * len(arrived) < expected:
            return
        for other in arrived:
            if other.barrier == name:
                other.barrier = None
        del self._arrived[name], self._expected[name]
        warp.cta.counters.barriers += 1
