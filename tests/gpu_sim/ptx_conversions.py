"""PTX comparison, selection and conversion (PTX ISA 8.8, sections 9.7.6, 9.7.7, 9.7.9)."""

from collections.abc import Callable
from functools import partial

import numpy as np

from gpu_sim.ptx_floats import (
    decode_float,
    encode_float,
    flush_subnormals,
)
from gpu_sim.ptx_machine import (
    Array,
    Mask,
    Warp,
)
from gpu_sim.ptx_operands import (
    F32,
    ROUNDING,
    TYPES,
    U32,
    Execute,
    PtxType,
    Read,
    allow,
    last_type,
    opcode,
    predicate_reader,
    predicate_writer,
    reader,
    writer,
)
from gpu_sim.ptx_parser import (
    Sink,
    Statement,
)


def _unordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": _unordered(np.equal),
    "neu": np.not_equal,
    "ltu": _unordered(np.less),
    "leu": _unordered(np.less_equal),
    "gtu": _unordered(np.greater),
    "geu": _unordered(np.greater_equal),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(statement: Statement, ptx_type: PtxType) -> Read:
    """Compares the two operands: 32 lanes, or 64 elements of a packed type."""
    compare = _COMPARE[statement.modifiers[0]]
    read_a, read_b = (reader(statement, o, ptx_type) for o in statement.operands[1:3])
    if not ptx_type.is_float:
        return lambda warp: compare(read_a(warp), read_b(warp))
    element = ptx_type.element
    raw_type = np.uint16 if ptx_type.packed else ptx_type.unsigned
    flush: Callable[[Array], Array] = (
        flush_subnormals if "ftz" in statement.modifiers else np.asarray
    )

    def read(warp: Warp) -> Array:
        a = flush(decode_float(read_a(warp).view(raw_type), element))
        b = flush(decode_float(read_b(warp).view(raw_type), element))
        return compare(a, b)

    return read


@opcode("setp")
def _decode_set_predicate(statement: Statement) -> Execute:
    ptx_type = last_type(statement)
    allow(statement, *_COMPARE, *_COMBINE, "ftz")
    destinations = statement.operands[0]
    first, second = destinations if isinstance(destinations, tuple) else (destinations, Sink())
    write_first = predicate_writer(statement, first)
    write_second = predicate_writer(statement, second)
    if statement.modifiers[0] not in _COMPARE:
        raise statement.unsupported()
    compare = _comparison(statement, ptx_type)
    if ptx_type.packed:
        if len(statement.operands) != 3:
            raise statement.unsupported()

        def execute_packed(warp: Warp, mask: Mask) -> None:
            both = compare(warp)
            write_first(warp, both[0::2], mask)
            write_second(warp, both[1::2], mask)

        return execute_packed
    combine = next((_COMBINE[m] for m in statement.modifiers if m in _COMBINE), None)
    read_third = predicate_reader(statement, statement.operands[3]) if combine else None
    if len(statement.operands) != (4 if combine else 3):
        raise statement.unsupported()

    def execute(warp: Warp, mask: Mask) -> None:
        result = compare(warp)
        inverse = ~result
        if combine and read_third:
            third = read_third(warp)
            result, inverse = combine(result, third), combine(inverse, third)
        write_first(warp, result, mask)
        write_second(warp, inverse, mask)

    return execute


@opcode("selp")
def _decode_select(statement: Statement) -> Execute:
    allow(statement)
    raw = PtxType("u", last_type(statement).bits)
    read_true, read_false = (reader(statement, o, raw) for o in statement.operands[1:3])
    choose = predicate_reader(statement, statement.operands[3])
    write = writer(statement, statement.operands[0], raw)

    def execute(warp: Warp, mask: Mask) -> None:
        write(warp, np.where(choose(warp), read_true(warp), read_false(warp)), mask)

    return execute


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(values: Array, target: PtxType, source: PtxType) -> Array:
    """Clamps to the target's range; NaN gives 0, or the smallest number where 64 bits take part."""
    low, high = np.iinfo(target.dtype).min, np.iinfo(target.dtype).max
    wide = values.astype(np.float64)
    below, above, nan = wide <= low, wide >= float(high), np.isnan(wide)
    safe = np.where(below | above | nan, 0, wide)
    result = safe.astype(target.dtype)
    result = np.where(below, low, np.where(above, high, result)).astype(target.dtype)
    indefinite = 1 << (target.bits - 1) if 64 in (target.bits, source.bits) else 0
    filler = np.array(indefinite, target.unsigned).view(target.dtype)
    return np.where(nan, filler, result)


def _integer_to_double(values: Array) -> Array:
    """An int as float64, with what does not fit kept as a sticky bit for a second rounding."""
    if values.dtype.itemsize < 8:
        return values.astype(np.float64)
    low = values & values.dtype.type(0x3FF)
    sticky = (values - low) | ((low != 0).astype(values.dtype) << values.dtype.type(9))
    large = np.abs(values.astype(np.float64)) >= 2.0**53
    return np.where(large, sticky, values).astype(np.float64)


def _round_to_tf32(values: Array, to_even: bool) -> Array:
    """Keeps 10 bits of the mantissa, to nearest: ties to even or away from zero."""
    bits = values.view(np.uint32)
    half = (
        np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        if to_even
        else np.uint32(0x1000)
    )
    rounded = (bits + half) & np.uint32(0xFFFFE000)
    finite = np.isfinite(values)
    kept = np.where(np.isnan(values), np.uint32(0x7FFFFFFF), bits)
    return np.where(finite, rounded, kept)


def _converter(statement: Statement, target: PtxType, source: PtxType) -> Callable[[Array], Array]:
    """The function from a row of source type to a row of target type (raw for floats)."""
    modifiers = statement.modifiers
    ftz = "ftz" in modifiers
    rounding = next((_TO_INTEGER[m] for m in modifiers if m in _TO_INTEGER), None)
    if not source.is_float and not target.is_float:
        if "sat" in modifiers:
            raise statement.unsupported("sat")
        return lambda row: row.astype(target.dtype)
    if not source.is_float:
        if target.bits >= 32:
            return lambda row: row.astype(target.dtype).view(target.unsigned)
        return lambda row: encode_float(_integer_to_double(row), target)

    def values_of(row: Array) -> Array:
        values = decode_float(row.view(source.unsigned), source)
        return flush_subnormals(values) if ftz and source.bits == 32 else values

    if not target.is_float:
        if rounding is None:
            raise statement.unsupported("rounding")
        return lambda row: float_to_integer(rounding(values_of(row)), target, source)
    if rounding is not None:
        return lambda row: encode_float(rounding(values_of(row)), target)

    def convert(row: Array) -> Array:
        values = values_of(row)
        if target.bits == 32:
            values = values.astype(np.float32)
            values = flush_subnormals(values) if ftz else values
        return encode_float(values, target)

    return convert


@opcode("cvt")
def _decode_convert(statement: Statement) -> Execute:
    allow(statement, *ROUNDING, *_TO_INTEGER, "rna", "rz", "relu", "tf32")
    target_name, source_name = statement.modifiers[-2:]
    if source_name not in TYPES or (set(statement.modifiers) & {"rz", "relu", "sat"}):
        raise statement.unsupported()
    source = TYPES[source_name]
    if target_name == "tf32":
        if source_name != "f32" or "ftz" in statement.modifiers:
            raise statement.unsupported()
        return _row_conversion(
            statement, partial(_round_to_tf32, to_even="rn" in statement.modifiers), U32, F32
        )
    if target_name not in TYPES or "rna" in statement.modifiers:
        raise statement.unsupported()
    target = TYPES[target_name]
    if target.packed:
        return _packing_conversion(statement, target, source)
    if source.packed:
        raise statement.unsupported()
    if target.is_float and target.bits < source.bits and "rn" not in statement.modifiers:
        raise statement.unsupported("rounding")
    convert = _converter(statement, target, source)
    stored = PtxType("u", target.bits) if target.is_float else target
    return _row_conversion(statement, convert, stored, source)


def _row_conversion(
    statement: Statement, convert: Callable[[Array], Array], target: PtxType, source: PtxType
) -> Execute:
    read = reader(statement, statement.operands[1], source)
    write = writer(statement, statement.operands[0], target)
    return lambda warp, mask: write(warp, convert(read(warp)), mask)


def _packing_conversion(statement: Statement, target: PtxType, source: PtxType) -> Execute:
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half."""
    if source != F32 or "rn" not in statement.modifiers or len(statement.operands) != 3:
        raise statement.unsupported()
    read_high, read_low = (reader(statement, o, F32) for o in statement.operands[1:])
    write = writer(statement, statement.operands[0], U32)

    def execute(warp: Warp, mask: Mask) -> None:
        halves = np.stack([read_low(warp), read_high(warp)], axis=1)
        write(warp, encode_float(halves, target.element).view(np.uint32)[:, 0], mask)

    return execute
