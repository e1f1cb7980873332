"""PTX arithmetic on integers and floats (PTX ISA 8.8, sections 9.7.1 to 9.7.5)."""

from collections.abc import Callable

import numpy as np

from gpu_sim.ptx_floats import (
    decode_float,
    encode_float,
    flush_subnormals,
    fused_multiply_add,
    maximum,
    minimum,
    propagating,
    xorsign,
)
from gpu_sim.ptx_machine import (
    Array,
    Mask,
    Warp,
)
from gpu_sim.ptx_operands import (
    ROUNDING,
    U32,
    Execute,
    PtxType,
    Read,
    allow,
    last_type,
    opcode,
    reader,
    writer,
)
from gpu_sim.ptx_parser import (
    Statement,
)


def _elements(row: Array, ptx_type: PtxType) -> Array:
    """The elements of a row: 64 halves of a packed type, else the 32 lanes."""
    return row.view(np.uint16).view(ptx_type.element.dtype) if ptx_type.packed else row


def integer_operation(
    statement: Statement, ptx_type: PtxType, function: Callable[..., Array], arity: int
) -> Execute:
    reads = [reader(statement, operand, ptx_type) for operand in statement.operands[1 : 1 + arity]]
    write = writer(statement, statement.operands[0], ptx_type)

    def execute(warp: Warp, mask: Mask) -> None:
        result = function(*[_elements(read(warp), ptx_type) for read in reads])
        write(warp, result.view(ptx_type.unsigned) if ptx_type.packed else result, mask)

    return execute


def float_operation(
    statement: Statement, ptx_type: PtxType, function: Callable[..., Array], arity: int
) -> Execute:
    reads = [reader(statement, operand, ptx_type) for operand in statement.operands[1 : 1 + arity]]
    write = writer(statement, statement.operands[0], ptx_type)
    element = ptx_type.element
    ftz = "ftz" in statement.modifiers
    if ftz and ptx_type.bits != 32:
        raise statement.unsupported("ftz")
    raw_type = np.uint16 if ptx_type.packed else ptx_type.unsigned

    def execute_single(warp: Warp, mask: Mask) -> None:
        write(warp, encode_float(function(*[read(warp) for read in reads]), element), mask)

    if ptx_type.dtype == np.float32 and not ftz:  # the common case, without its conversions
        return execute_single

    def execute(warp: Warp, mask: Mask) -> None:
        values = [decode_float(read(warp).view(raw_type), element) for read in reads]
        if ftz:
            result = flush_subnormals(function(*map(flush_subnormals, values)))
        else:
            result = function(*values)
        write(warp, encode_float(result, element).view(ptx_type.unsigned), mask)

    return execute


@opcode("add", "addc", "sub")
def _decode_add(statement: Statement) -> Execute:
    ptx_type = last_type(statement)
    function = np.subtract if statement.opcode == "sub" else np.add
    if ptx_type.is_float:
        allow(statement, *ROUNDING)
        return float_operation(statement, ptx_type, function, 2)
    allow(statement, "cc")
    if statement.opcode != "addc" and "cc" not in statement.modifiers:
        return integer_operation(statement, ptx_type, function, 2)
    if statement.opcode == "sub":
        raise statement.unsupported("borrow")
    read_a, read_b = (reader(statement, o, U32) for o in statement.operands[1:])
    return _with_carry(statement, lambda w: read_a(w).astype(np.uint64) + read_b(w))


def _with_carry(statement: Statement, total: Read) -> Execute:
    """The low 32 bits of a 64-bit total, with the carry flag taken in and given out."""
    if last_type(statement).bits != 32:
        raise statement.unsupported("carry")
    write = writer(statement, statement.operands[0], U32)
    takes, gives = statement.opcode in ("addc", "madc"), "cc" in statement.modifiers

    def execute(warp: Warp, mask: Mask) -> None:
        value = total(warp)
        if takes:
            value = value + warp.carry
        write(warp, value.astype(np.uint32), mask)
        if gives:
            np.copyto(warp.carry, value >> np.uint64(32), where=True if mask is None else mask)

    return execute


@opcode("min", "max")
def _decode_min_max(statement: Statement) -> Execute:
    ptx_type = last_type(statement)
    is_min = statement.opcode == "min"
    if not ptx_type.is_float:
        allow(statement)
        return integer_operation(statement, ptx_type, np.minimum if is_min else np.maximum, 2)
    allow(statement, "ftz", "NaN", "xorsign", "abs")
    select: Callable[[Array, Array], Array] = minimum if is_min else maximum
    if "xorsign" in statement.modifiers:
        select = xorsign(select)
    if "NaN" in statement.modifiers:
        select = propagating(select)
    return float_operation(statement, ptx_type, select, 2)


@opcode("abs", "neg")
def _decode_sign(statement: Statement) -> Execute:
    allow(statement, "ftz")
    ptx_type = last_type(statement)
    if not ptx_type.is_float:
        function = np.abs if statement.opcode == "abs" else np.negative
        return integer_operation(statement, ptx_type, function, 1)
    raw = PtxType("u", ptx_type.bits)
    sign = 0x8000_8000 if ptx_type.packed else 1 << (ptx_type.bits - 1)
    bit = raw.unsigned(sign)
    read = reader(statement, statement.operands[1], raw)
    write = writer(statement, statement.operands[0], raw)
    ftz = "ftz" in statement.modifiers
    clear = statement.opcode == "abs"

    def execute(warp: Warp, mask: Mask) -> None:
        bits = read(warp)
        if ftz:
            bits = flush_subnormals(bits.view(np.float32)).view(np.uint32)
        write(warp, bits & ~bit if clear else bits ^ bit, mask)

    return execute


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the full product, for 16, 32 or 64 bits, signed or not."""
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    carry = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> shift) + (carry >> shift)
    if a.dtype.kind == "i":
        high = (
            high - np.where(a < 0, y, 0).astype(np.uint64) - np.where(b < 0, x, 0).astype(np.uint64)
        )
    return high.view(a.dtype)


@opcode("mul", "mad", "fma", "madc")
def _decode_multiply(statement: Statement) -> Execute:
    ptx_type = last_type(statement)
    adds = statement.opcode != "mul"
    if ptx_type.is_float:
        allow(statement, *ROUNDING)
        if adds and ptx_type.bits == 64:
            raise statement.unsupported()
        function = fused_multiply_add if adds else np.multiply
        return float_operation(statement, ptx_type, function, 3 if adds else 2)
    allow(statement, "lo", "hi", "wide", "cc")
    high = multiply_high if "hi" in statement.modifiers else np.multiply
    if "cc" in statement.modifiers or statement.opcode == "madc":
        read_a, read_b, read_c = (reader(statement, o, U32) for o in statement.operands[1:])
        if ptx_type.kind != "u" or "wide" in statement.modifiers:
            raise statement.unsupported("carry")
        return _with_carry(
            statement, lambda w: high(read_a(w), read_b(w)).astype(np.uint64) + read_c(w)
        )
    if "wide" in statement.modifiers:
        return _wide_multiply(statement, ptx_type)
    if adds:
        return integer_operation(statement, ptx_type, lambda a, b, c: high(a, b) + c, 3)
    return integer_operation(statement, ptx_type, high, 2)


def _wide_multiply(statement: Statement, ptx_type: PtxType) -> Execute:
    wide = PtxType(ptx_type.kind, 2 * ptx_type.bits)
    read_a, read_b = (reader(statement, o, ptx_type) for o in statement.operands[1:3])
    adds = statement.opcode == "mad"
    read_c = reader(statement, statement.operands[3], wide) if adds else None
    write = writer(statement, statement.operands[0], wide)

    def execute(warp: Warp, mask: Mask) -> None:
        product = read_a(warp).astype(wide.dtype) * read_b(warp).astype(wide.dtype)
        write(warp, product if read_c is None else product + read_c(warp), mask)

    return execute


def _quotient(a: Array, b: Array) -> Array:
    """Integer division towards zero; by zero it gives all ones, as the hardware happens to."""
    minus_one = (b == -1) if b.dtype.kind == "i" else np.zeros(b.shape, bool)
    divisor = np.where((b == 0) | minus_one, 1, b).astype(b.dtype)
    exact = (a - np.fmod(a, divisor)) // divisor
    exact = np.where(minus_one, np.negative(a), exact)
    return np.where(b == 0, ~np.zeros_like(a), exact).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    minus_one = (b == -1) if b.dtype.kind == "i" else np.zeros(b.shape, bool)
    rest = np.fmod(a, np.where((b == 0) | minus_one, 1, b).astype(b.dtype))
    return np.where(b == 0, a, rest).astype(a.dtype)


def _approximate_quotient(a: Array, b: Array) -> Array:
    """div.approx: a * (1/b), where 1/b flushes to zero beyond 2^126."""
    flushed = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(flushed, a * np.copysign(np.float32(0), b), a / b)


@opcode("div")
def _decode_divide(statement: Statement) -> Execute:
    allow(statement, "full", "approx", *ROUNDING)
    ptx_type = last_type(statement)
    if ptx_type.is_float:
        function = _approximate_quotient if "approx" in statement.modifiers else np.divide
        return float_operation(statement, ptx_type, function, 2)
    return integer_operation(statement, ptx_type, _quotient, 2)


@opcode("rem")
def _decode_remainder(statement: Statement) -> Execute:
    allow(statement)
    return integer_operation(statement, last_type(statement), _remainder, 2)


def _in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Computes in float64 and rounds: what the hardware approximates, to half an ulp."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*_FUNCTIONS)
def _decode_function(statement: Statement) -> Execute:
    allow(statement, "approx", *ROUNDING)
    ptx_type = last_type(statement)
    return float_operation(statement, ptx_type, _in_double(_FUNCTIONS[statement.opcode]), 1)
