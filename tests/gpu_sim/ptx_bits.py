"""PTX logic, shifts and bit fields (PTX ISA 8.8, sections 9.7.1 and 9.7.8)."""

from collections.abc import Callable

import numpy as np

from gpu_sim.ptx_arithmetic import (
    integer_operation,
)
from gpu_sim.ptx_machine import (
    Array,
    Mask,
    Warp,
)
from gpu_sim.ptx_operands import (
    U32,
    Execute,
    PtxType,
    allow,
    last_type,
    opcode,
    predicate_reader,
    predicate_writer,
    reader,
    writer,
)
from gpu_sim.ptx_parser import (
    Immediate,
    Statement,
)


@opcode("and", "or", "xor", "not")
def _decode_logic(statement: Statement) -> Execute:
    functions: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.bitwise_not,
    }
    function = functions[statement.opcode]
    arity = 1 if statement.opcode == "not" else 2
    if statement.modifiers != ("pred",):
        allow(statement)
        return integer_operation(statement, last_type(statement), function, arity)
    reads = [predicate_reader(statement, o) for o in statement.operands[1:]]
    write = predicate_writer(statement, statement.operands[0])

    def execute(warp: Warp, mask: Mask) -> None:
        write(warp, function(*[read(warp) for read in reads]), mask)

    return execute


@opcode("shl", "shr")
def _decode_shift(statement: Statement) -> Execute:
    allow(statement)
    ptx_type = last_type(statement)
    read = reader(statement, statement.operands[1], ptx_type)
    read_amount = reader(statement, statement.operands[2], U32)
    write = writer(statement, statement.operands[0], ptx_type)
    bits, dtype = ptx_type.bits, ptx_type.dtype
    left, signed = statement.opcode == "shl", ptx_type.kind == "s"

    def execute(warp: Warp, mask: Mask) -> None:
        value, amount = read(warp), read_amount(warp)
        # Amounts beyond the width act as the width: all bits are gone, or all are the sign.
        clamped = np.minimum(amount, np.uint32(bits - 1)).astype(dtype)
        result = value << clamped if left else value >> clamped
        if left or not signed:
            result = np.where(amount < bits, result, 0).astype(dtype)
        write(warp, result, mask)

    return execute


def _bits_of(row: Array) -> Array:
    """[32, width] bits, most significant first."""
    big_endian = row.byteswap().view(np.uint8).reshape(row.size, -1)
    return np.unpackbits(big_endian, axis=1)


def _leading_zeros(row: Array) -> Array:
    bits = _bits_of(row)
    return np.where(bits.any(1), bits.argmax(1), bits.shape[1]).astype(np.uint32)


@opcode("popc", "clz", "brev")
def _decode_bit_count(statement: Statement) -> Execute:
    allow(statement)
    ptx_type = last_type(statement)
    read = reader(statement, statement.operands[1], ptx_type)
    if statement.opcode == "brev":
        write = writer(statement, statement.operands[0], ptx_type)

        def reverse(warp: Warp, mask: Mask) -> None:
            packed = np.packbits(_bits_of(read(warp)), axis=1, bitorder="little")
            write(warp, np.ascontiguousarray(packed).view(ptx_type.unsigned)[:, 0], mask)

        return reverse
    count: Callable[[Array], Array] = _leading_zeros
    if statement.opcode == "popc":
        count = lambda row: _bits_of(row).sum(1, dtype=np.uint32)  # noqa: E731
    write = writer(statement, statement.operands[0], U32)
    return lambda warp, mask: write(warp, count(read(warp)), mask)


def _shifted_left(value: Array, amount: Array, bits: int) -> Array:
    """A uint64 shift that gives 0 from `bits` on; numpy leaves such shifts undefined."""
    shifted = value << np.minimum(amount, np.uint64(63))
    return np.where(amount < bits, shifted, np.uint64(0))


def _low_ones(count: Array) -> Array:
    ones = ~np.uint64(0) >> np.minimum(
        np.uint64(64) - np.minimum(count, np.uint64(64)), np.uint64(63)
    )
    return np.where(count == 0, np.uint64(0), ones)


@opcode("bfe")
def _decode_extract(statement: Statement) -> Execute:
    allow(statement)
    ptx_type = last_type(statement)
    raw = PtxType("u", ptx_type.bits)
    read = reader(statement, statement.operands[1], raw)
    read_start, read_length = (reader(statement, o, U32) for o in statement.operands[2:])
    write = writer(statement, statement.operands[0], raw)
    top = np.uint64(ptx_type.bits - 1)

    def execute(warp: Warp, mask: Mask) -> None:
        value = read(warp).astype(np.uint64)
        start = (read_start(warp) & np.uint32(255)).astype(np.uint64)
        length = (read_length(warp) & np.uint32(255)).astype(np.uint64)
        inside = np.where(start <= top, value >> np.minimum(start, top), np.uint64(0))
        result = inside & _low_ones(length)
        if ptx_type.kind == "s":
            last = np.minimum(start + length - np.uint64(1), top)
            negative = ((value >> last) & np.uint64(1)).astype(bool) & (length > 0)
            given = np.minimum(length, np.where(start <= top, top + np.uint64(1) - start, 0))
            result = np.where(negative, result | ~_low_ones(given.astype(np.uint64)), result)
        write(warp, result.astype(raw.unsigned), mask)

    return execute


@opcode("bfi")
def _decode_insert(statement: Statement) -> Execute:
    allow(statement)
    ptx_type = last_type(statement)
    read_field, read_base = (reader(statement, o, ptx_type) for o in statement.operands[1:3])
    read_start, read_length = (reader(statement, o, U32) for o in statement.operands[3:])
    write = writer(statement, statement.operands[0], ptx_type)

    def execute(warp: Warp, mask: Mask) -> None:
        start = (read_start(warp) & np.uint32(255)).astype(np.uint64)
        length = (read_length(warp) & np.uint32(255)).astype(np.uint64)
        hole = _shifted_left(_low_ones(length), start, 64)
        field = _shifted_left(read_field(warp).astype(np.uint64), start, 64)
        result = (read_base(warp).astype(np.uint64) & ~hole) | (field & hole)
        write(warp, result.astype(ptx_type.unsigned), mask)

    return execute


@opcode("prmt")
def _decode_permute(statement: Statement) -> Execute:
    if statement.modifiers != ("b32",):
        raise statement.unsupported()
    read_low, read_high, read_control = (reader(statement, o, U32) for o in statement.operands[1:])
    write = writer(statement, statement.operands[0], U32)

    def execute(warp: Warp, mask: Mask) -> None:
        low, high = read_low(warp), read_high(warp)
        source = np.stack([low, high], axis=1).view(np.uint8)  # [32, 8]
        control = read_control(warp)[:, None] >> np.array([0, 4, 8, 12], np.uint32)
        picked = np.take_along_axis(source, (control & np.uint32(7)).astype(np.int64), axis=1)
        signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
        picked = np.where(control & np.uint32(8), signs, picked)
        write(warp, picked.view(np.uint32)[:, 0], mask)

    return execute


@opcode("lop3")
def _decode_lookup(statement: Statement) -> Execute:
    table = statement.operands[4]
    if statement.modifiers != ("b32",) or not isinstance(table, Immediate):
        raise statement.unsupported()
    reads = [reader(statement, o, U32) for o in statement.operands[1:4]]
    write = writer(statement, statement.operands[0], U32)
    minterms = [bits for bits in range(8) if table.value >> bits & 1]

    def execute(warp: Warp, mask: Mask) -> None:
        values = [read(warp) for read in reads]
        result = np.zeros(32, np.uint32)
        for bits in minterms:
            a, b, c = (v if bits >> (2 - i) & 1 else ~v for i, v in enumerate(values))
            result |= a & b & c
        write(warp, result, mask)

    return execute


@opcode("shf")
def _decode_funnel(statement: Statement) -> Execute:
    direction, mode, kind = statement.modifiers
    if direction not in "lr" or mode not in ("wrap", "clamp") or kind != "b32":
        raise statement.unsupported()
    read_low, read_high, read_amount = (reader(statement, o, U32) for o in statement.operands[1:])
    write = writer(statement, statement.operands[0], U32)

    def execute(warp: Warp, mask: Mask) -> None:
        both = read_low(warp).astype(np.uint64) | read_high(warp).astype(np.uint64) << np.uint64(32)
        amount = read_amount(warp)
        amount = amount & np.uint32(31) if mode == "wrap" else np.minimum(amount, np.uint32(32))
        if direction == "l":
            result = (both << amount.astype(np.uint64)) >> np.uint64(32)
            # A shift by 64 - 32 has lost nothing: the low word moves up whole.
            result = np.where(amount == 32, both & np.uint64(0xFFFFFFFF), result)
        else:
            result = both >> amount.astype(np.uint64)
        write(warp, result.astype(np.uint32), mask)

    return execute
