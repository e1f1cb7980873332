"""PTX types, and closures that read and write operands; each is built once when a kernel is parsed.

A closure that executes an instruction takes the warp and the mask of its active lanes. Rows of 32
lanes are numpy arrays; registers hold raw bits, types are views.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpu_sim.ptx_machine import UNSIGNED, Array, Mask, Warp
from gpu_sim.ptx_parser import Address, Immediate, Operand, Register, Sink, Special, Statement

Execute = Callable[[Warp, Mask], None]
Read = Callable[[Warp], Array]
Write = Callable[[Warp, Array, Mask], None]
Decode = Callable[[Statement], Execute]

DECODERS: dict[str, Decode] = {}


def opcode(*names: str) -> Callable[[Decode], Decode]:
    """Registers a decoder: a statement to the closure that executes it."""

    def register(decode: Decode) -> Decode:
        for name in names:
            assert name not in DECODERS, name
            DECODERS[name] = decode
        return decode

    return register


@dataclass(frozen=True)
class PtxType:
    """A type: `kind` u, s, b, f or bf; packed types have two elements of 16 bits."""

    kind: str
    bits: int
    packed: bool = False

    @cached_property
    def unsigned(self) -> type[np.unsignedinteger]:
        return UNSIGNED[self.bits]

    @cached_property
    def dtype(self) -> np.dtype:
        """How numpy sees a row; bfloat16, packed and bit types are unsigned integers."""
        letter = self.kind if self.kind in "sf" and not self.packed else "u"
        return np.dtype(f"{letter.replace('s', 'i')}{self.bits // 8}")

    @cached_property
    def element(self) -> "PtxType":
        return PtxType(self.kind, 16) if self.packed else self

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")


TYPES = {
    **{f"{k}{b}": PtxType(k, b) for k in "bus" for b in (8, 16, 32, 64)},
    **{f"f{bits}": PtxType("f", bits) for bits in (16, 32, 64)},
    "bf16": PtxType("bf", 16),
    # Packed types live in 32-bit registers: `bits` is the register's, `element` the contents'.
    **{f"{k}16x2": PtxType(k, 32, packed=True) for k in ("u", "s", "f", "bf")},
}
U32, U64, F32 = TYPES["u32"], TYPES["u64"], TYPES["f32"]
# What float instructions may say without changing what is done here, and .ftz, which is looked at.
ROUNDING = ("rn", "ftz")


def last_type(statement: Statement) -> PtxType:
    name = statement.modifiers[-1] if statement.modifiers else ""
    if name not in TYPES:
        raise statement.unsupported("type")
    return TYPES[name]


def allow(statement: Statement, *known: str) -> None:
    """Refuses a modifier that the decoder would otherwise ignore; types are checked elsewhere."""
    for modifier in statement.modifiers:
        if modifier not in known and modifier not in TYPES:
            raise statement.unsupported(f".{modifier}")


def constant_row(statement: Statement, operand: Immediate, ptx_type: PtxType) -> Array:
    value = operand.value
    if operand.float_width and ptx_type.bits != operand.float_width:
        if ptx_type.bits != 64 or ptx_type.kind != "f":
            raise statement.unsupported("float literal")
        value = int(np.uint32(value).view(np.float32).astype(np.float64).view(np.uint64))
    row = np.full(32, value & ((1 << ptx_type.bits) - 1), ptx_type.unsigned)
    row.flags.writeable = False
    return row


def reader(statement: Statement, operand: Operand, ptx_type: PtxType) -> Read:
    """Reads 32 lanes as `ptx_type`; a wider register gives its low bits."""
    dtype = ptx_type.dtype
    if isinstance(operand, Immediate):
        row = constant_row(statement, operand, ptx_type).view(dtype)
        return lambda warp: row
    if isinstance(operand, Special):
        name = operand.name
        return lambda warp: warp.special[name].astype(ptx_type.unsigned).view(dtype)
    if not isinstance(operand, Register) or operand.width < max(ptx_type.bits, 8):
        raise statement.unsupported(f"operand {operand}")
    width, index = operand.width, operand.index
    if width > ptx_type.bits:
        narrow = ptx_type.unsigned
        return lambda warp: warp.registers[width][index].astype(narrow).view(dtype)
    if dtype.kind == "u":
        return lambda warp: warp.registers[width][index]
    return lambda warp: warp.registers[width][index].view(dtype)


def writer(statement: Statement, operand: Operand, ptx_type: PtxType) -> Write:
    """Writes 32 lanes; a wider register gets the value extended as its type says."""
    if isinstance(operand, Sink):
        return lambda warp, value, mask: None
    if not isinstance(operand, Register) or operand.width < max(ptx_type.bits, 8):
        raise statement.unsupported(f"destination {operand}")
    width, index = operand.width, operand.index
    unsigned = UNSIGNED[width]

    if width > ptx_type.bits:
        signed = np.dtype(f"i{width // 8}")
        through = signed if ptx_type.kind == "s" else np.dtype(unsigned)

        def write_extended(warp: Warp, value: Array, mask: Mask) -> None:
            wide = value.view(ptx_type.dtype).astype(through).view(unsigned)
            np.copyto(warp.registers[width][index], wide, where=True if mask is None else mask)

        if ptx_type.is_float:
            raise statement.unsupported("float in a wider register")
        return write_extended

    def write(warp: Warp, value: Array, mask: Mask) -> None:
        if mask is None:
            warp.registers[width][index][:] = value.view(unsigned)
        else:
            np.copyto(warp.registers[width][index], value.view(unsigned), where=mask)

    return write


def predicate_reader(statement: Statement, operand: Operand) -> Read:
    """Reads a predicate; one that nothing has written is an error, for it has no poison value."""
    if isinstance(operand, Immediate):
        row = np.full(32, operand.value != 0)
        return lambda warp: row
    if not isinstance(operand, Register) or operand.width != 1:
        raise statement.unsupported(f"predicate {operand}")
    index = operand.index

    def read(warp: Warp) -> Array:
        if not warp.predicate_written[index]:
            raise RuntimeError(f"predicate {operand.name} read before it was written: {statement}")
        return warp.predicates[index]

    return read


def predicate_writer(statement: Statement, operand: Operand) -> Write:
    if isinstance(operand, Sink):
        return lambda warp, value, mask: None
    if not isinstance(operand, Register) or operand.width != 1:
        raise statement.unsupported(f"predicate {operand}")
    index = operand.index

    def write(warp: Warp, value: Array, mask: Mask) -> None:
        warp.predicate_written[index] = True
        np.copyto(warp.predicates[index], value, where=True if mask is None else mask)

    return write


def address_reader(statement: Statement, operand: Operand) -> Read:
    """Reads [base + offset] as uint64 lanes."""
    if not isinstance(operand, Address) or isinstance(operand.base, str):
        raise statement.unsupported(f"address {operand}")
    base, offset = operand.base, operand.offset
    if isinstance(base, Immediate):
        row = np.full(32, (base.value + offset) % (1 << 64), np.uint64)
        return lambda warp: row
    width, index = base.width, base.index
    if width == 64:
        shift = np.uint64(offset % (1 << 64))
        if offset == 0:
            return lambda warp: warp.registers[64][index]
        return lambda warp: warp.registers[64][index] + shift
    shift32 = np.uint32(offset % (1 << 32))
    return lambda warp: (warp.registers[width][index] + shift32).astype(np.uint64)


def items(operand: Operand) -> tuple[Operand, ...]:
    """A vector's items, or the operand alone."""
    return operand if isinstance(operand, tuple) else (operand,)


def require_whole_warp(statement: Statement, warp: Warp, mask: Mask) -> None:
    """Checks that no live lane is missing at an instruction that all lanes execute together."""
    if mask is None or (warp.live is not None and bool((mask == warp.live).all())):
        return
    missing = np.flatnonzero(~mask if warp.live is None else warp.live & ~mask).tolist()
    raise RuntimeError(
        f"divergent warp: lanes {missing} of warp {warp.index} are missing; "
        f"{statement}; CTA {warp.cta.index}"
    )
