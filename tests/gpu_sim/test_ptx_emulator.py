"""The PTX emulator against the PTX ISA: opcodes, memory, divergence, Triton kernels, mutations.

Every hand-written kernel must also be accepted by ptxas, so that no test is about illegal PTX.
References are Python integers, exact fractions or torch, never the emulator's own helpers.
"""

import itertools
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from gpu_sim.emulation import execute
from gpu_sim.ptx_emulator import Counters, Program, run
from pairwise import pairwise
from simmim_kernels.report.ahead_of_time import Launch, capture

Array = np.ndarray
SEEDS = range(8)

# --- hand-written kernels

TEMPLATE = """
.version 8.8
.target {target}
.address_size 64
.visible .entry test(.param .u64 input, .param .u64 output)
.reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<128>;
    .reg .b64 %rd<64>;
    {declarations}
    ld.param.b64 %rd60, [input];
    ld.param.b64 %rd61, [output];
    mov.u32 %r99, %tid.x;
    {body}
    ret;
}}
"""


def assemble(ptx: str, target: str) -> None:
    """Fails unless NVIDIA's assembler takes the text."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, f"--gpu-name={target}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr


def run_ptx(
    body: str,
    given: Array,
    result: Array,
    *,
    threads: int = 32,
    target: str = "sm_80",
    declarations: str = "",
    seed: int | None = 0,
    check: bool = True,
) -> Counters:
    """Runs a body that finds `given` at %rd60 and `result` at %rd61, %tid.x in %r99."""
    ptx = TEMPLATE.format(target=target, threads=threads, declarations=declarations, body=body)
    if check:
        assemble(ptx, target)
    program = Program.parse(ptx)
    pointers = [given.ctypes.data, result.ctypes.data]
    return run(program, (1,), pointers, [given, result], shared_bytes=0, seed=seed)


REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}


def apply(
    instruction: str, *operands: Array, result: Any = np.uint32, target: str = "sm_80"
) -> Array:
    """One instruction on arrays: "add.s32 {d}, {a}, {b};", a bool array being a predicate."""
    count = operands[0].size
    threads = -(-count // 32) * 32
    names, body, packed, offset = {}, [], [], 0
    for place, (letter, operand) in enumerate(zip("abcdef"[:3] + "e", operands)):
        raw = np.resize(np.asarray(operand), threads)
        raw = raw.astype(np.uint32) if raw.dtype == bool else raw
        register = f"{REGISTERS[raw.itemsize]}{place + 1}"
        body.append(f"mad.wide.u32 %rd50, %r99, {raw.itemsize}, %rd60;")
        body.append(f"ld.global.b{8 * raw.itemsize} {register}, [%rd50+{offset}];")
        if operand.dtype == bool:
            body.append(f"setp.ne.b32 %p{place + 1}, {register}, 0;")
            register = f"%p{place + 1}"
        names[letter] = register
        packed.append(raw.tobytes())
        offset += raw.nbytes
    is_predicate = result is bool
    dtype = np.dtype(np.uint32 if is_predicate else result)
    stored = f"{REGISTERS[dtype.itemsize]}0"
    body.append(instruction.format(d="%p0" if is_predicate else stored, **names))
    if is_predicate:
        body.append("selp.b32 %r0, 1, 0, %p0;")
    body.append(f"mad.wide.u32 %rd51, %r99, {dtype.itemsize}, %rd61;")
    body.append(f"st.global.b{8 * dtype.itemsize} [%rd51], {stored};")
    given = np.frombuffer(b"".join(packed) + bytes(8), np.uint8).copy()
    out = np.zeros(threads, dtype)
    # Two words cannot be misaligned by a preceding odd number of halves: sizes are multiples of 64.
    run_ptx("\n    ".join(body), given, out, threads=threads, target=target)
    return (out != 0)[:count] if is_predicate else out[:count]


def pairs(values: Sequence[Any], dtype: Any) -> tuple[Array, Array]:
    left, right = zip(*itertools.product(values, values))
    return np.array(left, dtype), np.array(right, dtype)


# --- integers


def edges(bits: int) -> list[int]:
    top = 1 << bits
    return [0, 1, 2, 7, 31, 32, 33, 100, top // 2 - 1, top // 2, top // 2 + 5, top - 1, top - 7]


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def interpreted(values: Array, type_name: str) -> list[int]:
    bits = int(type_name[1:])
    return [signed(int(v), bits) if type_name[0] == "s" else int(v) for v in values]


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def truncated_remainder(a: int, b: int) -> int:
    return a - b * truncated_quotient(a, b)


def shift_right(a: int, amount: int) -> int:
    return a >> min(amount, 200)


TWO_OPERANDS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
TWO_OPERAND_CASES = [
    *((op, t) for op in ("add", "sub", "min", "max") for t in ("s16", "s32", "s64")),
    *((op, t) for op in ("min", "max") for t in ("u16", "u32", "u64")),
    *(("mul.lo", t) for t in ("s16", "s32", "u32", "s64")),
    *((op, t) for op in ("and", "or", "xor") for t in ("b16", "b32", "b64")),
]


@pytest.mark.parametrize(("name", "type_name"), TWO_OPERAND_CASES)
def test_two_operand_integers(name: str, type_name: str) -> None:
    bits = int(type_name[1:])
    a, b = pairs(edges(bits), f"u{bits // 8}")
    found = apply(f"{name}.{type_name} {{d}}, {{a}}, {{b}};", a, b, result=f"u{bits // 8}")
    x, y = interpreted(a, type_name), interpreted(b, type_name)
    assert [int(f) for f in found] == [TWO_OPERANDS[name](*v) % (1 << bits) for v in zip(x, y)]


@pytest.mark.parametrize("type_name", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", ["div", "rem"])
def test_integer_division(name: str, type_name: str) -> None:
    bits = int(type_name[1:])
    a, b = pairs(edges(bits), f"u{bits // 8}")
    a, b = a[b != 0], b[b != 0]
    found = apply(f"{name}.{type_name} {{d}}, {{a}}, {{b}};", a, b, result=f"u{bits // 8}")
    divide = truncated_quotient if name == "div" else truncated_remainder
    expected = map(divide, interpreted(a, type_name), interpreted(b, type_name))
    assert [int(f) for f in found] == [e % (1 << bits) for e in expected]


@pytest.mark.parametrize("type_name", ["s32", "u32", "s64", "u64", "u16"])
def test_high_multiplication(type_name: str) -> None:
    bits = int(type_name[1:])
    a, b = pairs(edges(bits), f"u{bits // 8}")
    found = apply(f"mul.hi.{type_name} {{d}}, {{a}}, {{b}};", a, b, result=f"u{bits // 8}")
    x, y = interpreted(a, type_name), interpreted(b, type_name)
    assert [int(f) for f in found] == [(p * q >> bits) % (1 << bits) for p, q in zip(x, y)]


@pytest.mark.parametrize("type_name", ["s16", "u16", "s32", "u32"])
def test_wide_multiplication(type_name: str) -> None:
    bits = int(type_name[1:])
    a, b = pairs(edges(bits), f"u{bits // 8}")
    c = np.arange(a.size).astype(f"u{bits // 4}") * 12345
    wide = f"u{bits // 4}"
    x, y = interpreted(a, type_name), interpreted(b, type_name)
    products = [p * q for p, q in zip(x, y)]
    found = apply(f"mul.wide.{type_name} {{d}}, {{a}}, {{b}};", a, b, result=wide)
    assert [int(f) for f in found] == [p % (1 << 2 * bits) for p in products]
    found = apply(f"mad.wide.{type_name} {{d}}, {{a}}, {{b}}, {{c}};", a, b, c, result=wide)
    assert [int(f) for f in found] == [(p + int(z)) % (1 << 2 * bits) for p, z in zip(products, c)]


@pytest.mark.parametrize("type_name", ["s16", "s32", "s64"])
def test_multiply_add(type_name: str) -> None:
    bits = int(type_name[1:])
    a, b = pairs(edges(bits), f"u{bits // 8}")
    c = np.roll(a, 3)
    text = f"mad.lo.{type_name} {{d}}, {{a}}, {{b}}, {{c}};"
    found = apply(text, a, b, c, result=f"u{bits // 8}")
    expected = [(int(p) * int(q) + int(z)) % (1 << bits) for p, q, z in zip(a, b, c)]
    assert [int(f) for f in found] == expected


def test_carry_chain() -> None:
    """A 64-bit product plus a 32-bit number from 32-bit pieces, as in libdevice's sin."""
    a, b = pairs(edges(32), np.uint32)
    low = "mad.lo.cc.u32 %r20, {a}, {b}, {c}; madc.hi.u32 %r21, {a}, {b}, 0;"
    found = apply(low + "mov.b64 {d}, {{%r20, %r21}};", a, b, np.roll(b, 1), result=np.uint64)
    expected = [int(p) * int(q) + int(z) for p, q, z in zip(a, b, np.roll(b, 1))]
    assert [int(f) for f in found] == [e % (1 << 64) for e in expected]


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("kind", ["shl.b", "shr.u", "shr.s"])
def test_shifts_clamp_their_amount(kind: str, bits: int) -> None:
    values = [0, 1, 5, (1 << bits) - 1, (1 << bits) - 6, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    amounts = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 0x80000000, 0xFFFFFFFF]
    a, b = zip(*itertools.product(values, amounts))
    dtype = f"u{bits // 8}"
    found = apply(
        f"{kind}{bits} {{d}}, {{a}}, {{b}};",
        np.array(a, dtype),
        np.array(b, np.uint32),
        result=dtype,
    )
    expected = []
    for value, amount in zip(a, b):
        shifted = value << amount if kind == "shl.b" and amount < bits else 0
        if kind != "shl.b":
            shifted = shift_right(signed(value, bits) if kind == "shr.s" else value, amount)
        expected.append(shifted % (1 << bits))
    assert [int(f) for f in found] == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int) -> None:
    dtype = f"u{bits // 8}"
    values = np.array(edges(bits) + [1 << i for i in range(bits)], dtype)
    texts = [format(int(v), f"0{bits}b") for v in values]
    assert list(apply(f"popc.b{bits} {{d}}, {{a}};", values)) == [t.count("1") for t in texts]
    zeros = [bits - len(t.lstrip("0")) for t in texts]
    assert list(apply(f"clz.b{bits} {{d}}, {{a}};", values)) == zeros
    found = apply(f"brev.b{bits} {{d}}, {{a}};", values, result=dtype)
    assert [int(f) for f in found] == [int(t[::-1], 2) for t in texts]


@pytest.mark.parametrize("type_name", ["s32", "u32", "s64", "u64"])
def test_bit_field_extract(type_name: str) -> None:
    """The loop of the PTX ISA's definition, bit by bit."""
    bits = int(type_name[1:])
    dtype = f"u{bits // 8}"
    values = np.random.default_rng(0).integers(0, 1 << 63, 4).astype(dtype) * 2 + 1
    cases = list(
        itertools.product(
            values.tolist(), (0, 1, 16, 31, 40, 63, 64, 255, 256), (0, 1, 8, 31, 32, 64, 255, 257)
        )
    )
    a, start, length = zip(*cases)
    found = apply(
        f"bfe.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        np.array(a, dtype),
        np.array(start, np.uint32),
        np.array(length, np.uint32),
        result=dtype,
    )
    for value, first, count, got in zip(a, start, length, found):
        first, count = first & 255, count & 255
        top = bits - 1
        sign = 0
        if type_name[0] == "s" and count:
            sign = value >> min(first + count - 1, top) & 1
        expected = 0
        for bit in range(bits):
            inside = bit < count and first + bit <= top
            expected |= (value >> (first + bit) & 1 if inside else sign) << bit
        assert int(got) == expected, (value, first, count)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    dtype = f"u{bits // 8}"
    for start, length in [(0, 0), (0, 8), (5, 7), (bits - 3, 8), (bits, 4), (0, bits), (0, 255)]:
        a, b = pairs(edges(bits), dtype)
        text = f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {start}, {length};"
        found = apply(text, a, b, result=dtype)
        hole = sum(1 << i for i in range(start, min(start + length, bits)))
        expected = [(int(y) & ~hole) | (int(x) << start & hole) for x, y in zip(a, b)]
        assert [int(f) for f in found] == expected, (start, length)


def test_byte_permutation() -> None:
    a, b = np.array([0x83828180], np.uint32), np.array([0x07868584], np.uint32)
    source = [0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x07]
    controls = np.array([0x3210, 0x5410, 0x7632, 0xFEDC, 0xBA98, 0x0F80, 0x7777, 0x1234], np.uint32)
    found = apply(
        "prmt.b32 {d}, {a}, {b}, {c};", a.repeat(8), b.repeat(8), controls, result=np.uint32
    )
    for control, got in zip(controls.tolist(), found.tolist()):
        picks = [control >> 4 * i & 15 for i in range(4)]
        bytes_ = [(0xFF if source[p & 7] & 0x80 else 0) if p & 8 else source[p & 7] for p in picks]
        assert got == int.from_bytes(bytes(bytes_), "little"), hex(control)


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x80, 0x01])
def test_lookup_of_three(table: int) -> None:
    a, b, c = np.random.default_rng(table).integers(0, 1 << 32, (3, 32)).astype(np.uint32)
    found = apply(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", a, b, c)
    expected = [
        sum(
            (table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i
            for i in range(32)
        )
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shift(direction: str, mode: str) -> None:
    amounts = np.array([0, 1, 8, 31, 32, 33, 64, 0xFFFFFFFF], np.uint32)
    low, high = np.uint32(0x89ABCDEF).repeat(8), np.uint32(0x01234567).repeat(8)
    found = apply(f"shf.{direction}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", low, high, amounts)
    both = 0x0123456789ABCDEF
    for amount, got in zip(amounts.tolist(), found.tolist()):
        n = amount & 31 if mode == "wrap" else min(amount, 32)
        shifted = both << n >> 32 if direction == "l" else both >> n
        assert got == shifted & 0xFFFFFFFF, amount


def test_integer_sign_and_not() -> None:
    for bits in (16, 32, 64):
        dtype = f"u{bits // 8}"
        values = np.array(edges(bits), dtype)
        numbers = interpreted(values, f"s{bits}")
        for name, function in (("abs.s", abs), ("neg.s", lambda v: -v), ("not.b", lambda v: ~v)):
            found = apply(f"{name}{bits} {{d}}, {{a}};", values, result=dtype)
            assert [int(f) for f in found] == [function(n) % (1 << bits) for n in numbers], name


def test_packed_integers() -> None:
    a, b = pairs([0x7FFF8000, 0x0001FFFF, 0x80007FFF, 0x12345678], np.uint32)
    halves = (a.view(np.int16).astype(int), b.view(np.int16).astype(int))
    for name, function in (("add", np.add), ("max", np.maximum), ("min", np.minimum)):
        found = apply(f"{name}.s16x2 {{d}}, {{a}}, {{b}};", a, b, target="sm_90a")
        assert (found.view(np.uint16) == (function(*halves) & 0xFFFF)).all(), name


# --- floating point

PRECISION = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}


def nearest(value: Fraction, type_name: str) -> float:
    """The exact value rounded once, to nearest even, in a format's range."""
    precision, smallest, largest = PRECISION[type_name]
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    rounded = round(value / quantum) * quantum
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, rounded)
    return float(rounded)


def to_bits(values: Sequence[float], type_name: str) -> Array:
    """Numbers that the format holds exactly, as its bits."""
    if type_name == "bf16":
        return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.array(values, type_name.replace("f16", "f2").replace("f32", "f4")).view(
        {"f16": np.uint16, "f32": np.uint32}[type_name]
    )


def to_floats(bits: Array, type_name: str) -> list[float]:
    if type_name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(float).tolist()
    return bits.view({"f16": np.float16, "f32": np.float32}[type_name]).astype(float).tolist()


def finite_values(type_name: str) -> list[float]:
    """Ties, subnormals and the extremes, exact in the format."""
    precision, smallest, largest = PRECISION[type_name]
    step = 2.0 ** (1 - precision)
    magnitudes = [1.0, 1 + step, 1 + 3 * step, 1.5, 2 - step, step / 2, step, 3 * step / 2]
    magnitudes += [2.0**smallest, 2.0 ** (smallest + 1 - precision), 2.0 ** (smallest - 1)]
    magnitudes += [2.0**largest * (2 - step), 2.0 ** (largest // 2), 3.0]
    return [0.0, *magnitudes, *(-m for m in magnitudes)]


ARITHMETIC: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div.full": lambda a, b: a / b,
    "div.rn": lambda a, b: a / b,
}
ARITHMETIC_CASES = [
    ("add", "f32", "sm_80"),
    ("sub", "f32", "sm_80"),
    ("mul", "f32", "sm_80"),
    ("div.rn", "f32", "sm_80"),
    ("div.full", "f32", "sm_80"),
    ("add", "f16", "sm_80"),
    ("sub", "f16", "sm_80"),
    ("mul", "f16", "sm_80"),
    ("add", "bf16", "sm_90a"),
    ("sub", "bf16", "sm_90a"),
    ("mul", "bf16", "sm_90a"),
]


@pytest.mark.parametrize(("name", "type_name", "target"), ARITHMETIC_CASES)
def test_float_arithmetic_rounds_once(name: str, type_name: str, target: str) -> None:
    left, right = zip(*itertools.product(finite_values(type_name), repeat=2))
    if name.startswith("div"):
        left, right = zip(*[(a, b) for a, b in zip(left, right) if b])
    a, b = to_bits(left, type_name), to_bits(right, type_name)
    found = apply(f"{name}.{type_name} {{d}}, {{a}}, {{b}};", a, b, result=a.dtype, target=target)
    exact = [ARITHMETIC[name](Fraction(x), Fraction(y)) for x, y in zip(left, right)]
    assert to_floats(found, type_name) == [nearest(e, type_name) for e in exact]


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
def test_fused_multiply_add_rounds_once(type_name: str) -> None:
    values = finite_values(type_name)[:15]
    a, b, c = zip(*itertools.product(values, values[:8], [v for v in values] + [-values[1]]))
    precision = PRECISION[type_name][0]
    # A product exactly between two numbers, and an addend too small for float64 that decides.
    tie, tiny = 1 + 2.0 ** (1 - precision), 2.0**-14 if type_name == "f16" else 2.0**-100
    extra = [(1 + 2.0**-precision * 2, 1.5, s * tiny) for s in (1, -1)] + [(tie, 1.5, tiny)]
    a, b, c = (list(x) + [e[i] for e in extra] for i, x in enumerate((a, b, c)))
    a, b, c = a[-960:], b[-960:], c[-960:]
    bits = [to_bits(x, type_name) for x in (a, b, c)]
    found = apply(f"fma.rn.{type_name} {{d}}, {{a}}, {{b}}, {{c}};", *bits, result=bits[0].dtype)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c)]
    assert to_floats(found, type_name) == [nearest(e, type_name) for e in exact]


SPECIAL = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan], np.float32)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn", "div.full"])
def test_infinities_and_canonical_nan(name: str) -> None:
    a, b = pairs(SPECIAL, np.float32)
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    with np.errstate(all="ignore"):
        expected = functions.get(name, np.divide)(a, b)
    bits = np.where(np.isnan(expected), np.uint32(0x7FFFFFFF), expected.view(np.uint32))
    found = apply(f"{name}.f32 {{d}}, {{a}}, {{b}};", a.view(np.uint32), b.view(np.uint32))
    assert (found == bits).all()


@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN", "min.xorsign.abs"])
def test_float_min_max(name: str) -> None:
    target = "sm_90a" if "xorsign" in name else "sm_80"
    a, b = pairs(SPECIAL, np.float32)
    found = apply(f"{name}.f32 {{d}}, {{a}}, {{b}};", a, b, target=target).view(np.float32)
    for x, y, got in zip(a.tolist(), b.tolist(), found.tolist()):
        if math.isnan(x) or math.isnan(y):
            both = math.isnan(x) and math.isnan(y)
            expected = math.nan if both or "NaN" in name else (y if math.isnan(x) else x)
            if "xorsign" in name and not both:
                assert abs(got) == abs(expected)
                continue
        elif "xorsign" in name:
            sign = math.copysign(1, x) * math.copysign(1, y)
            expected = math.copysign(min(abs(x), abs(y)), sign)
        else:  # -0 is below +0
            order = sorted([x, y], key=lambda v: (v, math.copysign(1, v)))
            expected = order[0 if name.startswith("min") else 1]
        assert np.float32(got).tobytes() == np.float32(expected).tobytes() or got != got != expected
        assert math.isnan(got) == math.isnan(expected), (x, y)
        assert math.isnan(got) or math.copysign(1, got) == math.copysign(1, expected), (x, y)


def test_sign_operations_keep_the_payload() -> None:
    a = np.array([0x00000000, 0x80000000, 0x3F800000, 0xFF800000, 0x00000001], np.uint32)
    assert (apply("neg.f32 {d}, {a};", a) == a ^ np.uint32(0x80000000)).all()
    assert (apply("abs.f32 {d}, {a};", a) == a & np.uint32(0x7FFFFFFF)).all()
    assert (apply("neg.f16x2 {d}, {a};", a) == a ^ np.uint32(0x80008000)).all()
    assert (apply("abs.bf16x2 {d}, {a};", a) == a & np.uint32(0x7FFF7FFF)).all()


@pytest.mark.parametrize(("type_name", "target"), [("f16x2", "sm_80"), ("bf16x2", "sm_90a")])
def test_packed_floats(type_name: str, target: str) -> None:
    element = type_name.removesuffix("x2")
    left, right = zip(*itertools.product(finite_values(element)[:16], repeat=2))
    a, b = (to_bits(v, element).view(np.uint32) for v in (left, right))
    for name in ("add", "mul"):
        found = apply(f"{name}.{type_name} {{d}}, {{a}}, {{b}};", a, b, target=target)
        exact = [ARITHMETIC[name](Fraction(x), Fraction(y)) for x, y in zip(left, right)]
        assert to_floats(found.view(np.uint16), element) == [nearest(e, element) for e in exact]


def test_flush_to_zero() -> None:
    tiny = np.array([2.0**-130, -(2.0**-130), 2.0**-126, 2.0**-70], np.float32)
    one = np.float32([1, 1, 0.5, 2.0**-70])
    found = apply("mul.ftz.f32 {d}, {a}, {b};", tiny, one).view(np.float32)
    assert found.tobytes() == np.float32([0, -0.0, 0, 0]).tobytes()
    kept = apply("mul.f32 {d}, {a}, {b};", tiny, one).view(np.float32)
    assert kept.tobytes() == (tiny * one).tobytes()
    found = apply("ex2.approx.ftz.f32 {d}, {a};", np.float32([-130, -126, 2.0**-130]))
    assert found.view(np.float32).tolist() == [0, 2.0**-126, 1]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("ex2.approx", torch.exp2),
        ("lg2.approx", torch.log2),
        ("rcp.rn", torch.reciprocal),
        ("rcp.approx.ftz", torch.reciprocal),
        ("sqrt.rn", torch.sqrt),
        ("sqrt.approx.ftz", torch.sqrt),
        ("rsqrt.approx", torch.rsqrt),
        ("sin.approx", torch.sin),
        ("cos.approx", torch.cos),
        ("tanh.approx", torch.tanh),
    ],
)
def test_functions(name: str, reference: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values = np.concatenate([SPECIAL, np.linspace(-20, 20, 57, dtype=np.float32)])
    found = apply(f"{name}.f32 {{d}}, {{a}};", values).view(np.float32)
    expected = reference(torch.from_numpy(values).double()).float()
    torch.testing.assert_close(
        torch.from_numpy(found), expected, rtol=2e-7, atol=1e-45, equal_nan=True
    )
    assert (np.signbit(found) == np.signbit(expected.numpy()))[~np.isnan(found)].all()


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("type_name", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_comparison(type_name: str) -> None:
    bits = int(type_name[1:])
    a, b = pairs(edges(bits), f"u{bits // 8}")
    x, y = interpreted(a, type_name), interpreted(b, type_name)
    for name, compare in COMPARISONS.items():
        found = apply(f"setp.{name}.{type_name} {{d}}, {{a}}, {{b}};", a, b, result=bool)
        assert found.tolist() == [compare(*v) for v in zip(x, y)], name


@pytest.mark.parametrize(
    "name", [*COMPARISONS, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_float_comparison_with_nan(name: str) -> None:
    """Plain comparisons are false with a NaN, `ne` too; those in u are true."""
    a, b = pairs(SPECIAL, np.float32)
    found = {
        "f32": apply(f"setp.{name}.f32 {{d}}, {{a}}, {{b}};", a, b, result=bool),
        "f16": apply(
            f"setp.{name}.f16 {{d}}, {{a}}, {{b}};",
            *(v.astype(np.float16) for v in (a, b)),
            result=bool,
        ),
    }
    for x, y, *got in zip(a.tolist(), b.tolist(), *found.values()):
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        elif unordered:
            expected = name.endswith("u")
        else:
            expected = COMPARISONS[name.removesuffix("u")](x, y)
        assert got == [expected, expected], (x, y)


def test_comparison_combines_and_inverts() -> None:
    a = np.array([1, 2, 3, 4], np.int32)
    third = np.array([True, False, True, False])
    text = (
        "setp.lt.and.s32 %p5|%p6, {a}, 3, {b}; selp.b32 {d}, 1, 0, %p5; @%p6 add.s32 {d}, {d}, 2;"
    )
    assert apply(text, a, third).tolist() == [1, 0, 2, 0]
    text = "setp.gt.f16x2 %p5|%p6, {a}, {b}; selp.b32 {d}, 1, 0, %p5; @%p6 add.s32 {d}, {d}, 2;"
    x = np.array([1, 5, 7, 1], np.float16).view(np.uint32)
    assert apply(text, x, np.array([0, 6, 0, 0], np.float16).view(np.uint32)).tolist() == [1, 3]


def test_predicates() -> None:
    p, q = pairs([False, True], bool)
    for name, function in (("and", p & q), ("or", p | q), ("xor", p ^ q)):
        found = apply(f"{name}.pred {{d}}, {{a}}, {{b}};", p, q, result=bool)
        assert (found == function).all(), name
    assert (apply("not.pred {d}, {a};", p, result=bool) == ~p).all()
    x, y = np.arange(4, dtype=np.uint64), np.arange(4, 8, dtype=np.uint64)
    assert (
        apply("selp.b64 {d}, {a}, {b}, {c};", x, y, p, result=np.uint64) == np.where(p, x, y)
    ).all()
    assert (
        apply("@!{c} mov.b64 {a}, {b}; mov.b64 {d}, {a};", x, y, p, result=np.uint64)
        == np.where(p, x, y)
    ).all()


# --- conversions


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_narrowing_rounds_to_nearest_even(type_name: str) -> None:
    precision, smallest, largest = PRECISION[type_name]
    half = 2.0**-precision
    values = [1 + half, 1 + 3 * half, 1 + half * (1 + 2.0**-10), 1 + half * (1 - 2.0**-10)]
    values += [2.0 ** (smallest - precision), 2.0 ** (smallest - precision) * 1.25, 2.0**smallest]
    values += [2.0**largest * (2 - half), 2.0**largest * (2 - 1.5 * half), 0.1, -0.1, 3.1e38]
    singles = np.array([*values, *(-v for v in values)], np.float32)
    expected = [nearest(Fraction(float(v)), type_name) for v in singles]
    found = apply(f"cvt.rn.{type_name}.f32 {{d}}, {{a}};", singles, result=np.uint16)
    assert to_floats(found, type_name) == expected
    both = apply(f"cvt.rn.{type_name}x2.f32 {{d}}, {{a}}, {{b}};", singles, np.roll(singles, 1))
    assert to_floats(both.view(np.uint16)[1::2], type_name) == expected, "a is the upper half"
    assert to_floats(both.view(np.uint16)[0::2], type_name) == np.roll(expected, 1).tolist()
    nan = apply(f"cvt.rn.{type_name}.f32 {{d}}, {{a}};", np.float32([np.nan]), result=np.uint16)
    assert nan.tolist() == [0x7FFF]


def test_widening_is_exact() -> None:
    every = np.arange(1 << 16).astype(np.uint16)[::67]
    half = apply("cvt.f32.f16 {d}, {a};", every[:960]).view(np.float32)
    np.testing.assert_array_equal(half, every[:960].view(np.float16).astype(np.float32))
    brain = apply("cvt.f32.bf16 {d}, {a};", every[-960:], target="sm_90a")
    shifted = (every[-960:].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(brain.view(np.float32), shifted)


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("type_name", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_float_to_integer_saturates(type_name: str, rounding: str) -> None:
    bits = int(type_name[1:])
    low, high = (
        (-(1 << bits - 1), (1 << bits - 1) - 1) if type_name[0] == "s" else (0, (1 << bits) - 1)
    )
    values = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 32767.5, 65535.5, 2.0**31, -(2.0**31)]
    values += [2.0**32, 2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30, math.inf, -math.inf, math.nan]
    functions = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    singles = np.array(values, np.float32)
    dtype = f"u{bits // 8}"
    found = apply(f"cvt.{rounding}.{type_name}.f32 {{d}}, {{a}};", singles, result=dtype)
    for value, got in zip(singles.astype(float).tolist(), found.tolist()):
        if math.isnan(value):
            expected = 1 << 63 if bits == 64 else 0
        elif math.isinf(value):
            expected = high if value > 0 else low
        else:
            expected = min(max(functions[rounding](value), low), high)
        assert got == expected % (1 << bits), value


@pytest.mark.parametrize("target_type", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("type_name", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_to_float(type_name: str, target_type: str) -> None:
    bits = int(type_name[1:])
    near = [(1 << k) + d for k in (8, 11, 24, 25, 40, 53, 61) for d in (-1, 0, 1, 3)]
    near += [(1 << 61) + (1 << 53), (1 << 61) + (1 << 53) + 1, (1 << 60) + (1 << 36) + 1]
    values = np.array([v for v in edges(bits) + near if v < 1 << bits], f"u{bits // 8}")
    dtype = np.uint32 if target_type == "f32" else np.uint16
    text = f"cvt.rn.{target_type}.{type_name} {{d}}, {{a}};"
    found = apply(text, values, result=dtype, target="sm_90a")
    expected = [nearest(Fraction(v), target_type) for v in interpreted(values, type_name)]
    assert to_floats(found, target_type) == expected


def test_integer_to_integer() -> None:
    values = np.array([0x0000FF80, 0x12345678, 0xFFFFFFFF, 0x7F], np.uint32)
    assert apply("cvt.s32.s16 {d}, {a};", values).tolist() == [0xFFFFFF80, 0x5678, 0xFFFFFFFF, 0x7F]
    assert apply("cvt.s32.s8 {d}, {a};", values).tolist() == [0xFFFFFF80, 0x78, 0xFFFFFFFF, 0x7F]
    assert apply("cvt.u32.u8 {d}, {a};", values).tolist() == [0x80, 0x78, 0xFF, 0x7F]
    found = apply("cvt.s64.s32 {d}, {a};", values, result=np.int64)
    assert found.tolist() == [0xFF80, 0x12345678, -1, 0x7F]
    assert apply("cvt.u16.u32 {d}, {a};", values, result=np.uint16).tolist() == [
        0xFF80,
        0x5678,
        0xFFFF,
        0x7F,
    ]


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_float_rounding_to_integral(rounding: str) -> None:
    values = np.float32([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, 1e10, -0.0, np.inf])
    functions = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    found = apply(f"cvt.{rounding}.f32.f32 {{d}}, {{a}};", values).view(np.float32)
    assert found.tobytes() == functions[rounding](values).tobytes()


def test_tf32_rounding_and_double() -> None:
    one, ulp = 0x3F800000, 0x2000
    values = np.array(
        [one + ulp // 2, one + ulp // 2 - 1, one + ulp + ulp // 2, 0x7F800000], np.uint32
    )
    away = apply("cvt.rna.tf32.f32 {d}, {a};", values)
    assert away.tolist() == [one + ulp, one, one + 2 * ulp, 0x7F800000]
    even = apply("cvt.rn.tf32.f32 {d}, {a};", values, target="sm_90a")
    assert even.tolist() == [one, one, one + 2 * ulp, 0x7F800000]
    doubles = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 0.1])
    found = apply("cvt.rn.f32.f64 {d}, {a};", doubles).view(np.float32)
    assert found.tolist() == [nearest(Fraction(v), "f32") for v in doubles.tolist()]


# --- memory


def test_moves_pack_and_unpack() -> None:
    a = np.arange(32).astype(np.uint64) * 0x1234567890AB + 0xFEDC_0000_0000_0000
    text = "mov.b64 {{%r20, %r21}}, {a}; mov.b64 {d}, {{%r21, %r20}};"
    assert (apply(text, a, result=np.uint64) == (a >> 32 | a << 32)).all()
    words = a.astype(np.uint32)
    text = "mov.b32 {{%rs20, _}}, {a}; mov.b32 {d}, {{%rs20, %rs20}};"
    assert (apply(text, words) == (words & 0xFFFF) * 0x10001).all()


def test_subword_loads_extend() -> None:
    given = np.array([0x80, 0x7F, 0xFF, 0x01] * 16, np.uint8)
    result = np.zeros((32, 4), np.uint32)
    run_ptx(
        """
    cvt.u64.u32 %rd1, %r99;
    add.s64 %rd1, %rd1, %rd60;
    mad.wide.u32 %rd3, %r99, 16, %rd61;
    ld.global.s8 %r1, [%rd1];
    ld.global.u8 %r2, [%rd1];
    sub.s64 %rd4, %rd1, %rd60;
    shl.b64 %rd4, %rd4, 1;
    add.s64 %rd4, %rd4, %rd60;
    ld.global.s16 %r3, [%rd4];
    ld.global.u16 %r4, [%rd4];
    st.global.v4.b32 [%rd3], {%r1, %r2, %r3, %r4};
    """,
        given,
        result,
    )
    bytes_, halves = given[:32], given.view(np.uint16)
    assert (result[:, 0] == bytes_.view(np.int8).astype(np.int32).view(np.uint32)).all()
    assert (result[:, 1] == bytes_).all()
    assert (result[:, 2] == halves.view(np.int16).astype(np.int32).view(np.uint32)).all()
    assert (result[:, 3] == halves).all()


VECTOR_COPY = """
    mad.wide.u32 %rd1, %r99, {bytes}, %rd60;
    mad.wide.u32 %rd2, %r99, {bytes}, %rd61;
    {guard} ld.global{load}.{vector} {{{registers}}}, [%rd1];
    {guard} st.global{store}.{vector} [%rd2], {{{registers}}};
"""


@pytest.mark.parametrize(
    ("vector", "prefix", "width", "count"),
    [
        *(("v2.b8", "%rs", 1, 2), ("v4.b8", "%rs", 1, 4), ("v4.b16", "%rs", 2, 4)),
        *(("v2.b32", "%r", 4, 2), ("v4.b32", "%r", 4, 4), ("v2.b64", "%rd1", 8, 2)),
    ],
)
def test_vector_copies_and_their_cost(vector: str, prefix: str, width: int, count: int) -> None:
    size = width * count
    body = VECTOR_COPY.format(
        bytes=size,
        guard="",
        load=".L1::evict_last",
        store=".cs",
        vector=vector,
        registers=", ".join(f"{prefix}{i + 10 if prefix != '%rd1' else i}" for i in range(count)),
    )
    given = np.random.default_rng(0).integers(0, 256, 64 * size).astype(np.uint8)
    result = np.zeros_like(given)
    counters = run_ptx(body, given, result, threads=64)
    assert (given == result).all()
    assert counters.global_load_bytes == counters.global_store_bytes == 64 * size
    assert counters.global_load_requests == counters.global_store_requests == 2
    first, end = given.ctypes.data, given.ctypes.data + given.nbytes
    assert size <= counters.global_load_sectors <= 2 * (32 * size // 32 + 1)
    assert counters.global_load_sectors >= (end - 1) // 32 - first // 32 + 1 - 1


def test_global_access_outside_the_buffers() -> None:
    body = """
    setp.ne.b32 %p1, %r99, 3;
    mad.wide.u32 %rd1, %r99, 4, %rd60;
    ld.global.b32 %r1, [%rd1+{offset}];
    """
    given, result = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run_ptx(body.format(offset=0), given, result)
    with pytest.raises(
        MemoryError, match=r"out-of-bounds.*PTX line 19.*CTA \(0, 0, 0\), lanes \[30, 31\]"
    ):
        run_ptx(body.format(offset=4), given[:31].copy(), result[:30].copy())
    with pytest.raises(MemoryError, match=r"misaligned.*lanes \[0, 1, 2"):
        run_ptx(body.format(offset=2), given, result)
    # A wide access that begins inside and ends outside.
    wide = "ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd60];".replace("{{", "{").replace("}}", "}")
    with pytest.raises(MemoryError, match="out-of-bounds"):
        run_ptx(wide, np.zeros(64, np.uint8)[_aligned(16) : _aligned(16) + 12], result)


def _aligned(size: int) -> int:
    """Host arrays of 64 bytes begin at 16-byte boundaries."""
    probe = np.zeros(64, np.uint8)
    assert probe.ctypes.data % size == 0
    return 0


def test_unwritten_registers_and_memory_are_poison() -> None:
    given, result = np.zeros(1, np.uint32), np.zeros((32, 4), np.float32)
    body = """
    mov.u32 %r10, tile;
    ld.shared.b32 %r2, [%r10+64];
    mov.b32 {%rs3, _}, %r1;
    cvt.f32.f16 %r3, %rs3;
    mov.b64 %rd5, depot;
    ld.local.b32 %r4, [%rd5];
    mad.wide.u32 %rd1, %r99, 16, %rd61;
    st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
    """
    tiles = ".shared .align 16 .b8 tile[128]; .local .align 4 .b8 depot[8];"
    run_ptx(body, given, result, declarations=tiles)
    assert np.isnan(result[:, :3]).all()
    assert (result[:, 3].view(np.uint32) == 0xF7F7F7F7).all()
    with pytest.raises(RuntimeError, match="predicate %p3 read before"):
        run_ptx("@%p3 ld.global.b32 %r1, [%rd60];", given, result)
    with pytest.raises(MemoryError, match="shared access"):
        run_ptx(
            "mov.u32 %r10, tile; ld.shared.b32 %r2, [%r10+128];", given, result, declarations=tiles
        )
    with pytest.raises(MemoryError, match="shared access"):
        run_ptx("mov.u32 %r10, 0; ld.shared.b32 %r2, [%r10];", given, result, declarations=tiles)


def test_local_memory_is_private() -> None:
    result = np.zeros(64, np.uint32)
    body = """
    mov.b64 %rd5, depot;
    st.local.b32 [%rd5+4], %r99;
    ld.local.b32 %r4, [%rd5+4];
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    st.global.b32 [%rd1], %r4;
    """
    declarations = ".local .align 4 .b8 depot[8];"
    run_ptx(body, result, result, threads=64, declarations=declarations)
    assert (result == np.arange(64)).all()


def test_bank_conflicts() -> None:
    body = """
    mov.u32 %r10, tile;
    mad.lo.s32 %r11, %r99, {stride}, %r10;
    st.shared.b32 [%r11], %r99;
    """
    nothing = np.zeros(1, np.uint32)
    tiles = ".shared .align 16 .b8 tile[4096];"
    for stride, wavefronts in ((4, 1), (8, 2), (128, 32), (0, 1), (12, 1)):
        text = body.format(stride=stride)
        counters = run_ptx(text, nothing, nothing.copy(), declarations=tiles)
        assert (counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (wavefronts, 1)


@pytest.mark.parametrize(
    ("instruction", "dtype", "expected"),
    [
        ("red.global.gpu.relaxed.add.f32 [%rd60], %r1;", np.float32, sum(range(33))),
        ("atom.global.gpu.acq_rel.add.u32 %r2, [%rd60], %r1;", np.uint32, sum(range(33))),
        ("atom.global.max.s32 %r2, [%rd60], %r1;", np.int32, 32),
        ("atom.global.min.s32 %r2, [%rd60], %r1;", np.int32, 0),
        ("atom.global.xor.b32 %r2, [%rd60], %r1;", np.uint32, 32),
        ("atom.global.or.b32 %r2, [%rd60], %r1;", np.uint32, 63),
        ("atom.global.exch.b32 %r2, [%rd60], %r1;", np.uint32, 32),
        ("atom.global.cas.b32 %r2, [%rd60], 0, %r1;", np.uint32, 1),
    ],
)
def test_atomics(instruction: str, dtype: type, expected: int) -> None:
    total, result = np.zeros(1, dtype), np.zeros(32, np.uint32)
    convert = "cvt.rn.f32.u32 %r1, %r1;" if dtype == np.float32 else ""
    save = (
        ""
        if "red" in instruction
        else "mad.wide.u32 %rd1, %r99, 4, %rd61; st.global.b32 [%rd1], %r2;"
    )
    counters = run_ptx(f"add.s32 %r1, %r99, 1; {convert} {instruction} {save}", total, result)
    assert total[0] == expected
    assert counters.atomics == 32
    if "add.u32" in instruction:
        assert (np.diff(np.sort(result.astype(int))) > 0).all()  # each lane saw another total


def test_shared_atomics() -> None:
    """A histogram of lane / 5, as tl.histogram makes it."""
    result = np.zeros(8, np.uint32)
    body = """
    mov.u32 %r10, bins;
    setp.lt.u32 %p1, %r99, 8;
    shl.b32 %r11, %r99, 2;
    add.s32 %r11, %r11, %r10;
    @%p1 st.shared.b32 [%r11], 0;
    bar.sync 0;
    div.u32 %r1, %r99, 5;
    shl.b32 %r1, %r1, 2;
    add.s32 %r1, %r1, %r10;
    atom.shared.add.u32 %r2, [%r1], 1;
    bar.sync 0;
    @%p1 ld.shared.b32 %r3, [%r11];
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    @%p1 st.global.b32 [%rd1], %r3;
    """
    run_ptx(body, result, result, declarations=".shared .align 4 .b8 bins[32];")
    assert result.tolist() == [5, 5, 5, 5, 5, 5, 2, 0]


def test_packed_and_vector_atomics() -> None:
    total, result = np.zeros(8, np.float16), np.zeros(1, np.uint32)
    run_ptx("mov.b32 %r1, 0x3C004000; red.global.add.noftz.f16x2 [%rd60], %r1;", total, result)
    assert total.tolist() == [64, 32, 0, 0, 0, 0, 0, 0]
    floats = np.zeros(4, np.float32)
    text = (
        "mov.b32 %r1, 0f3F800000; red.global.gpu.relaxed.add.v4.f32 [%rd60], {%r1, %r1, %r1, %r1};"
    )
    run_ptx(text, floats, result, target="sm_90a")
    assert (floats == 32).all()


COPY_BODY = """
    mov.u32 %r10, tile;
    shl.b32 %r11, %r99, 4;
    add.s32 %r12, %r10, %r11;
    cvt.u64.u32 %rd1, %r11;
    add.s64 %rd2, %rd1, %rd60;
    add.s64 %rd3, %rd1, %rd61;
    mov.u32 %r13, {first_size};
    cp.async.cg.shared.global [%r12], [%rd2], 16, %r13;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r12+512], [%rd2+512], 16;
    cp.async.commit_group;
    {wait}
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r12+{read}];
    st.global.v4.b32 [%rd3], {{%r1, %r2, %r3, %r4}};
"""


@pytest.mark.parametrize(
    ("wait", "read", "arrives"),
    [
        ("cp.async.wait_group 1;", 0, True),
        ("cp.async.wait_group 1;", 512, False),
        ("cp.async.wait_group 0;", 512, True),
        ("cp.async.wait_all;", 512, True),
        ("", 0, False),
    ],
)
def test_copies_arrive_only_at_the_wait(wait: str, read: int, arrives: bool) -> None:
    given, result = np.arange(256, dtype=np.float32), np.zeros(128, np.float32)
    declarations = ".shared .align 16 .b8 tile[1024];"
    body = COPY_BODY.format(wait=wait, read=read, first_size=16)
    run_ptx(body, given, result, declarations=declarations)
    expected = given[read // 4 :][:128] if arrives else np.full(128, np.nan)
    np.testing.assert_array_equal(result, expected)
    body = COPY_BODY.format(wait="cp.async.wait_all;", read=0, first_size=0)
    run_ptx(body, given, result, declarations=declarations)
    assert (result == 0).all()


# --- lanes, warps, control flow


def shuffled(mode: str, lane: int, b: int, c: int) -> int | None:
    """The source lane by the PTX ISA's pseudo-code; None if out of range."""
    segment, clamp = c >> 8 & 31, c & 31
    highest = (lane & segment) | (clamp & ~segment)
    lowest = lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[
        mode
    ]
    return source if (source >= highest if mode == "up" else source <= highest) else None


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize(
    ("b", "c"), [(1, 31), (16, 31), (3, 0x181F), (5, 0x1C07), (2, 0), (31, 0x1000)]
)
def test_shuffle(mode: str, b: int, c: int) -> None:
    a = np.arange(100, 132, dtype=np.uint32)
    text = f"shfl.sync.{mode}.b32 {{d}}|%p5, {{a}}, {b}, {c}, -1; @!%p5 add.s32 {{d}}, {{d}}, 1000;"
    found = apply(text, a)
    for lane, got in enumerate(found.tolist()):
        source = shuffled(mode, lane, b, c)
        assert got == (1100 + lane if source is None else 100 + source), lane


def test_warp_reductions_and_votes() -> None:
    a = np.random.default_rng(0).integers(0, 1 << 32, 32).astype(np.uint32)
    number = a.view(np.int32).astype(np.int64)
    for name, expected in (
        ("add.s32", int(number.sum()) % (1 << 32)),
        ("min.s32", int(number.min()) % (1 << 32)),
        ("max.u32", int(a.max())),
        ("and.b32", int(np.bitwise_and.reduce(a))),
        ("xor.b32", int(np.bitwise_xor.reduce(a))),
    ):
        found = apply(f"redux.sync.{name} {{d}}, {{a}}, -1;", a)
        assert set(found.tolist()) == {expected}, name
    p = a % 3 == 0
    ballot = apply("vote.sync.ballot.b32 {d}, {a}, -1;", p)
    assert set(ballot.tolist()) == {sum(1 << i for i in range(32) if p[i])}
    assert apply("vote.sync.any.pred {d}, {a}, -1;", p, result=bool).all()
    assert not apply("vote.sync.all.pred {d}, {a}, -1;", p, result=bool).any()
    inside = apply("mov.u32 {d}, 0; @{a} activemask.b32 {d};", p)
    assert set(inside[p].tolist()) == set(ballot.tolist())
    leader = apply("elect.sync {d}|%p5, -1; @%p5 add.s32 {d}, {d}, 7;", p, target="sm_90a")
    assert leader.tolist() == [7] + [0] * 31


def test_divergent_loop_and_branches() -> None:
    """Each lane sums 1..lane, odd lanes negate: lanes part and meet again at the shuffle."""
    result = np.zeros(32, np.int32)
    counters = run_ptx(
        """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
LOOP:
    setp.ge.u32 %p1, %r2, %r99;
    @%p1 bra DONE;
    add.s32 %r2, %r2, 1;
    add.s32 %r1, %r1, %r2;
    bra LOOP;
DONE:
    and.b32 %r3, %r99, 1;
    setp.eq.b32 %p2, %r3, 0;
    @%p2 bra EVEN;
    neg.s32 %r1, %r1;
    bra.uni JOIN;
EVEN:
    add.s32 %r1, %r1, 1000;
JOIN:
    shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    st.global.b32 [%rd1], %r4;
    """,
        result,
        result,
    )
    sums = [n * (n + 1) // 2 for n in range(32)]
    own = [-s if n % 2 else s + 1000 for n, s in enumerate(sums)]
    assert result.tolist() == [own[n ^ 1] for n in range(32)]
    assert counters.warp_instructions > 31 * 5


def test_loop_that_lanes_leave_one_after_the_other() -> None:
    """Compare-and-swap by all lanes on one word, as LLVM lowers atomics that sm_80 lacks."""
    total, result = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    counters = run_ptx(
        """
    ld.global.b32 %r1, [%rd60];
AGAIN:
    add.s32 %r2, %r1, 3;
    atom.global.cas.b32 %r3, [%rd60], %r1, %r2;
    setp.ne.b32 %p1, %r3, %r1;
    mov.b32 %r1, %r3;
    @%p1 bra AGAIN;
    bar.sync 0;
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    st.global.b32 [%rd1], %r1;
    """,
        total,
        result,
    )
    assert total[0] == 96
    assert sorted(result.tolist()) == list(range(0, 96, 3))
    assert counters.barriers == 1


def test_lanes_that_left_do_not_count() -> None:
    result = np.zeros(32, np.int32)
    body = """
    setp.ge.u32 %p1, %r99, 20;
    @%p1 ret;
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    st.global.b32 [%rd1], 1;
    bar.warp.sync -1;
    """
    run_ptx(body, result, result)
    assert result.tolist() == [1] * 20 + [0] * 12


def test_divergent_barrier_is_an_error() -> None:
    nothing = np.zeros(1, np.uint32)
    inside = "setp.lt.u32 %p1, %r99, {n}; @%p1 bra SKIP; bar.sync 0; SKIP: mov.u32 %r1, 0;"
    with pytest.raises(RuntimeError, match=r"divergent barrier.*some lanes of warp 0"):
        run_ptx(inside.format(n=5), nothing, nothing)
    with pytest.raises(RuntimeError, match=r"divergent barrier, never complete.*warp 0 has left"):
        run_ptx(inside.format(n=32), nothing, nothing, threads=64)
    with pytest.raises(RuntimeError, match="divergent warp"):
        run_ptx(
            "setp.lt.u32 %p1, %r99, 5; @%p1 shfl.sync.bfly.b32 %r1, %r99, 1, 31, -1;",
            nothing,
            nothing,
        )


EXCHANGE = """
    mov.u32 %r10, tile;
    shl.b32 %r11, %r99, 2;
    xor.b32 %r12, %r11, 128;
    add.s32 %r11, %r11, %r10;
    add.s32 %r12, %r12, %r10;
    st.shared.b32 [%r11], %r99;
    {barrier}
    ld.shared.b32 %r1, [%r12];
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    st.global.b32 [%rd1], %r1;
"""


def test_barrier_orders_warps_and_its_absence_shows() -> None:
    nothing, result = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    tiles = {"threads": 64, "declarations": ".shared .align 4 .b8 tile[256];"}

    def matches(barrier: str, seed: int | None) -> bool:
        body = EXCHANGE.format(barrier=barrier)
        run_ptx(body, nothing, result, seed=seed, check=seed == 0, **tiles)
        return bool((result == np.arange(64) ^ 32).all())

    for barrier in ("bar.sync 0;", "barrier.sync 3, 64;"):
        assert all(matches(barrier, seed) for seed in (*SEEDS, None))
    assert not all(matches("", seed) for seed in SEEDS)
    assert matches("", None)  # lock step hides it


def test_scheduler_is_deterministic() -> None:
    nothing = np.zeros(1, np.uint32)
    body = """
    atom.global.add.u32 %r1, [%rd60], 1;
    mad.wide.u32 %rd1, %r99, 4, %rd61;
    st.global.b32 [%rd1], %r1;
    """

    def order(seed: int) -> list[int]:
        result = np.zeros(256, np.uint32)
        run_ptx(body, nothing * 0, result, threads=256, seed=seed, check=False)
        return result.tolist()

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in SEEDS}) > 1


def test_endless_loop_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_sim.ptx_emulator.MAX_WARP_INSTRUCTIONS", 1000)
    with pytest.raises(RuntimeError, match="does not end"):
        run_ptx("AGAIN: bra AGAIN;", np.zeros(1), np.zeros(1), check=False)


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r99, 1;",
        "fma.rz.f32 %r1, %r1, %r1, %r1;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r1;",
        "dp4a.s32.s32 %r1, %r1, %r1, %r1;",
        "mov.u32 %r1, %clock;",
        "ld.b32 %r1, [%rd60];",
        "prmt.b32.f4e %r1, %r1, %r1, %r1;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r1, %r2, %r3, %r4};",
    ],
)
def test_unknown_instruction_names_its_line(line: str) -> None:
    opcode = re.escape(line.split()[0])
    with pytest.raises(NotImplementedError, match=rf"PTX line 16: {opcode}"):
        run_ptx(line, np.zeros(1), np.zeros(1), check=False)


def test_float_and_negative_arguments() -> None:
    given, result = np.zeros(1, np.float32), np.zeros(2, np.uint32)
    text = TEMPLATE.replace(".param .u64 input", ".param .f32 scale, .param .u32 n").replace(
        "ld.param.b64 %rd60, [input];", "ld.param.b32 %r1, [scale]; ld.param.b32 %r2, [n];"
    )
    body = "st.global.v2.b32 [%rd61], {%r1, %r2};"
    text = text.format(target="sm_80", threads=32, declarations="", body=body)
    assemble(text, "sm_80")
    program = Program.parse(text)
    for scale in (0.1, np.float32(0.1), 3):
        run(program, (1,), [scale, -2, result.ctypes.data], [given, result], shared_bytes=0)
        assert result.view(np.float32)[0] == np.float32(scale)
        assert result[1] == 0xFFFFFFFE


def test_arguments_are_checked() -> None:
    program = Program.parse(TEMPLATE.format(target="sm_80", threads=32, declarations="", body=""))
    assert program.parameters == [("u64", "input"), ("u64", "output")]
    assert (program.name, program.num_threads) == ("test", 32)
    with pytest.raises(ValueError, match="2 parameters, got 3"):
        run(program, (1,), [0, 0, 0], [], shared_bytes=0)
    with pytest.raises(ValueError, match="does not fit"):
        run(program, (1,), [1 << 64], [], shared_bytes=0)
    with pytest.raises(TypeError, match="float"):
        run(program, (1,), [0.5], [], shared_bytes=0)
    with pytest.raises(ValueError, match="contiguous"):
        run(program, (1,), [], [np.zeros((4, 4))[:, 1]], shared_bytes=0)


# --- mma.sync and ldmatrix against the fragment layouts of the PTX ISA


@pytest.mark.parametrize("type_name", ["f16", "bf16", "tf32"])
def test_mma(type_name: str) -> None:
    rng = np.random.default_rng(0)
    K = 8 if type_name == "tf32" else 16
    A, B, C = (rng.integers(-8, 9, s).astype(np.float32) / 4 for s in ((16, K), (K, 8), (16, 8)))
    registers = np.zeros((10, 32), np.uint32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            registers[6 + i, lane] = C[group + 8 * (i // 2), 2 * thread + i % 2].view(np.uint32)
        if type_name == "tf32":
            # Bits below the 10th of the mantissa must not take part.
            a = [
                A[group + 8 * (i % 2), thread + 4 * (i // 2)].view(np.uint32) | 0x1FFF
                for i in range(4)
            ]
            b = [B[thread + 4 * i, group].view(np.uint32) | 0x1FFF for i in range(2)]
        else:
            half_a = [
                [A[group + 8 * (i % 2), 2 * thread + h + 8 * (i // 2)] for h in range(2)]
                for i in range(4)
            ]
            half_b = [[B[2 * thread + h + 8 * i, group] for h in range(2)] for i in range(2)]
            a, b = (to_bits(np.ravel(x), type_name).view(np.uint32) for x in (half_a, half_b))
        registers[:4, lane], registers[4:6, lane] = a, b
    names = [f"%r{i}" for i in range(10)]
    loads = "".join(f"ld.global.b32 {n}, [%rd1+{128 * i}];" for i, n in enumerate(names))
    a, b, c = (f"{{{', '.join(names[s])}}}" for s in (slice(4), slice(4, 6), slice(6, 10)))
    result = np.zeros((4, 32), np.float32)
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};" for i in range(4))
    body = (
        "mad.wide.u32 %rd1, %r99, 4, %rd60; mad.wide.u32 %rd2, %r99, 4, %rd61;"
        f"{loads} mma.sync.aligned.m16n8k{K}.row.col.f32.{type_name}.{type_name}.f32 "
        f"{{%r20, %r21, %r22, %r23}}, {a}, {b}, {c}; {stores}"
    )
    counters = run_ptx(body, registers, result)
    expected = A.astype(np.float64) @ B + C
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            assert result[i, lane] == expected[group + 8 * (i // 2), 2 * thread + i % 2]
    assert counters.mma_flops == 2 * 16 * 8 * K


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrix_loads_and_stores(count: int, transposed: bool) -> None:
    """ldmatrix hands lane 4r+c the row r of its matrix, columns 2c and 2c+1; stmatrix undoes it."""
    given = np.arange(count * 64, dtype=np.uint16)
    result = np.zeros((2, count * 64), np.uint16)
    bytes_ = 128 * count
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};" for i in range(count))
    # Thread t fills row t of the matrices, stacked; only the first 8 * count threads have one.
    body = f"""
    mov.u32 %r10, tile;
    rem.u32 %r9, %r99, {8 * count};
    mad.lo.s32 %r11, %r9, 16, %r10;
    mad.wide.u32 %rd1, %r9, 16, %rd60;
    mad.wide.u32 %rd2, %r99, 4, %rd61;
    mad.wide.u32 %rd3, %r9, 16, %rd61;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
    st.shared.v4.b32 [%r11], {{%r1, %r2, %r3, %r4}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
    {stores}
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r11+{bytes_}], {{{registers}}};
    bar.warp.sync -1;
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r11+{bytes_}];
    st.global.v4.b32 [%rd3+{bytes_}], {{%r1, %r2, %r3, %r4}};
    """
    tiles = f".shared .align 16 .b8 tile[{2 * bytes_}];"
    run_ptx(body, given, result, target="sm_90a", declarations=tiles)
    matrices = given.reshape(count, 8, 8)
    expected = matrices.transpose(0, 2, 1) if transposed else matrices
    assert (result[0].reshape(count, 8, 8) == expected).all()
    assert (result[1] == given).all()


# --- kernels that Triton compiled


def compile_kernel(
    kernel: Any, arguments: Sequence[Any], capability: int, programs: int = 1, **options: Any
) -> Launch:
    with capture(f"sm_{capability}") as launches:
        kernel[(programs,)](*arguments, **options)
    return launches[0]


@triton.jit
def add_kernel(p_x, p_y, p_out, n, BLOCK: tl.constexpr):
    i_element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_element = i_element < n
    b_x = tl.load(p_x + i_element, mask=m_element)
    b_y = tl.load(p_y + i_element, mask=m_element)
    tl.store(p_out + i_element, b_x + b_y, mask=m_element)


@triton.jit
def sum_kernel(p_x, p_out, p_total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i_row = tl.arange(0, ROWS)
    b_x = tl.load(p_x + i_row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.float32)
    b_sum = tl.sum(b_x, axis=1)
    tl.store(p_out + i_row, b_sum)
    tl.atomic_add(p_total, tl.sum(b_sum))


@triton.jit
def sort_kernel(p_x, p_out, N: tl.constexpr, descending: tl.constexpr):
    i_element = tl.arange(0, N)
    tl.store(p_out + i_element, tl.sort(tl.load(p_x + i_element), descending=descending))


@triton.jit
def cumsum_kernel(p_x, p_out, N: tl.constexpr):
    i_element = tl.arange(0, N)
    tl.store(p_out + i_element, tl.cumsum(tl.load(p_x + i_element), 0))


@triton.jit
def matmul_kernel(
    p_a, p_b, p_c, K, a_row, a_column, b_row, b_column,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    i_row, i_column, i_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    b_c = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK):
        b_a = tl.load(p_a + i_row[:, None] * a_row + (k + i_k)[None, :] * a_column)
        b_b = tl.load(p_b + (k + i_k)[:, None] * b_row + i_column[None, :] * b_column)
        b_c = tl.dot(b_a, b_b, b_c, input_precision=precision)
    tl.store(p_c + i_row[:, None] * N + i_column[None, :], b_c)


@dataclass(frozen=True)
class CompiledCase:
    """A compiled kernel on tensors of its own.

    `error` runs a program (the kernel's own, or a mutation) under a seed of the scheduler, and
    returns the largest error of its results.
    """

    launch: Launch
    error: Callable[[Program, int | None], float]

    @property
    def ptx(self) -> str:
        return self.launch.compiled.asm["ptx"]


@cache
def add_case(capability: int, num_warps: int, dtype: torch.dtype) -> CompiledCase:
    torch.manual_seed(0)
    x, y = (torch.randn(250).to(dtype) for _ in range(2))
    arguments = [x, y, torch.empty_like(x), 250]
    launch = compile_kernel(add_kernel, arguments, capability, 2, num_warps=num_warps, BLOCK=128)

    def error(program: Program, seed: int | None) -> float:
        arguments[2].fill_(torch.nan)
        counters = execute(launch, program, seed)
        assert counters.global_load_bytes == 2 * 250 * x.element_size()
        return float((arguments[2] - (x + y)).abs().max())

    return CompiledCase(launch, error)


@cache
def sum_case(capability: int, num_warps: int, dtype: torch.dtype) -> CompiledCase:
    torch.manual_seed(0)
    x = torch.randn(8, 128).to(dtype)
    arguments = [x, torch.empty(8), torch.empty(1)]
    launch = compile_kernel(
        sum_kernel, arguments, capability, num_warps=num_warps, ROWS=8, COLUMNS=128
    )

    def error(program: Program, seed: int | None) -> float:
        arguments[1].fill_(torch.nan)
        arguments[2].zero_()
        execute(launch, program, seed)
        rows = (arguments[1] - x.float().sum(1)).abs().max()
        return float(torch.maximum(rows, (arguments[2] - x.float().sum()).abs()))

    return CompiledCase(launch, error)


@cache
def sort_case(capability: int, num_warps: int, descending: bool) -> CompiledCase:
    torch.manual_seed(0)
    x = torch.randint(-(2**63), 2**63 - 1, (128,))
    x[:4] = torch.tensor([-(2**63), 2**63 - 1, 0, 0])
    arguments = [x, torch.empty_like(x)]
    launch = compile_kernel(
        sort_kernel, arguments, capability, num_warps=num_warps, N=128, descending=descending
    )

    def error(program: Program, seed: int | None) -> float:
        arguments[1].fill_(-1)
        execute(launch, program, seed)
        return float((arguments[1] != x.sort(descending=descending)[0]).sum())

    return CompiledCase(launch, error)


@cache
def cumsum_case(capability: int, num_warps: int, dtype: torch.dtype) -> CompiledCase:
    torch.manual_seed(0)
    x = torch.randint(-1000, 1000, (512,)).to(dtype)
    arguments = [x, torch.empty_like(x)]
    launch = compile_kernel(cumsum_kernel, arguments, capability, num_warps=num_warps, N=512)

    def error(program: Program, seed: int | None) -> float:
        arguments[1].fill_(-1)
        execute(launch, program, seed)
        return float((arguments[1] - x.cumsum(0)).abs().max())

    return CompiledCase(launch, error)


@cache
def matmul_case(
    capability: int,
    num_warps: int,
    dtype: torch.dtype,
    precision: str = "tf32",
    M: int = 32,
    N: int = 32,
    block: int = 32,
    a_by_columns: bool = False,
    b_by_columns: bool = False,
) -> CompiledCase:
    """A product over four blocks in K, pipelined in three stages; the error beyond rounding."""
    torch.manual_seed(0)
    K = 4 * block
    a = torch.randn(K, M).to(dtype).T if a_by_columns else torch.randn(M, K).to(dtype)
    b = torch.randn(N, K).to(dtype).T if b_by_columns else torch.randn(K, N).to(dtype)
    c = torch.empty(M, N)
    # Pass the storages, so that the tensors which the kernel gets are contiguous.
    arguments = [
        a.T if a_by_columns else a,
        b.T if b_by_columns else b,
        c,
        K,
        *a.stride(),
        *b.stride(),
    ]
    launch = compile_kernel(
        matmul_kernel,
        arguments,
        capability,
        num_warps=num_warps,
        num_stages=3,
        M=M,
        N=N,
        BLOCK=block,
        precision=precision,
    )
    exact = a.double() @ b.double()
    if dtype == torch.float32 and precision == "tf32":
        # The hardware drops the 13 low bits of each operand.
        cut = [
            (t.contiguous().view(torch.int32) & -8192).view(torch.float32).double() for t in (a, b)
        ]
        exact = cut[0] @ cut[1]

    def error(program: Program, seed: int | None) -> float:
        c.fill_(torch.nan)
        execute(launch, program, seed)
        return float((c - exact).abs().max()) / math.sqrt(K)

    return CompiledCase(launch, error)


def assert_right(
    case: CompiledCase, tolerance: float, seeds: Sequence[int | None] = (*SEEDS, None)
) -> None:
    program = Program.parse(case.ptx)
    for seed in seeds if program.num_threads > 32 else (0,):
        assert case.error(program, seed) <= tolerance, f"seed {seed}"


CAPABILITIES, NUM_WARPS = [80, 90], [1, 2, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("capability", "num_warps", "dtype"), pairwise(CAPABILITIES, NUM_WARPS, DTYPES), ids=str
)
def test_vector_add(capability: int, num_warps: int, dtype: torch.dtype) -> None:
    assert_right(add_case(capability, num_warps, dtype), 0)


@pytest.mark.parametrize(
    ("capability", "num_warps", "dtype"), pairwise(CAPABILITIES, NUM_WARPS, DTYPES), ids=str
)
def test_block_reduction(capability: int, num_warps: int, dtype: torch.dtype) -> None:
    assert_right(sum_case(capability, num_warps, dtype), 1e-4)


@pytest.mark.parametrize(
    ("capability", "num_warps", "descending"), pairwise(CAPABILITIES, NUM_WARPS, [False, True])
)
def test_sort(capability: int, num_warps: int, descending: bool) -> None:
    assert_right(
        sort_case(capability, num_warps, descending), 0, (0, None) if descending else SEEDS
    )


@pytest.mark.parametrize(
    ("capability", "num_warps", "dtype"),
    pairwise(CAPABILITIES, NUM_WARPS, [torch.int64, torch.float32]),
    ids=str,
)
def test_cumulative_sum(capability: int, num_warps: int, dtype: torch.dtype) -> None:
    assert_right(cumsum_case(capability, num_warps, dtype), 0)


@pytest.mark.parametrize(
    ("capability", "num_warps", "kind"),
    pairwise(CAPABILITIES, NUM_WARPS, ["bf16", "f16", "tf32"]),
)
def test_matmul(capability: int, num_warps: int, kind: str) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    case = matmul_case(capability, num_warps, dtype)
    assert f"mma.sync.aligned.m16n8k{8 if kind == 'tf32' else 16}" in case.ptx
    assert "cp.async.wait_group" in case.ptx
    assert_right(case, 1e-6)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("num_warps", NUM_WARPS)
def test_matmul_in_ieee_precision(capability: int, num_warps: int) -> None:
    case = matmul_case(capability, num_warps, torch.float32, "ieee", M=16, N=16, block=16)
    assert "mma" not in case.ptx
    assert_right(case, 1e-6)


WGMMA_CASES = [
    # (dtype, N, block, A by columns, B by columns, swizzle of a descriptor in bytes)
    (torch.bfloat16, 64, 64, False, False, 128),
    (torch.bfloat16, 32, 32, False, True, 64),
    (torch.bfloat16, 16, 16, False, True, 32),
    (torch.float16, 128, 64, True, False, 128),
    (torch.float16, 32, 32, True, True, 64),
    (torch.float32, 64, 32, False, True, 128),
    (torch.float32, 16, 16, False, True, 64),
]


@pytest.mark.parametrize(
    ("dtype", "N", "block", "a_by_columns", "b_by_columns", "swizzle_bytes"), WGMMA_CASES
)
def test_wgmma(
    dtype: torch.dtype,
    N: int,
    block: int,
    a_by_columns: bool,
    b_by_columns: bool,
    swizzle_bytes: int,
) -> None:
    case = matmul_case(
        90, 4, dtype, M=64, N=N, block=block, a_by_columns=a_by_columns, b_by_columns=b_by_columns
    )
    ptx = case.ptx
    assert "wgmma.mma_async" in ptx
    swizzles = {int(d) >> 62 & 3 for d in re.findall(r"-?\b\d{19}\b", ptx)}
    assert {128: 1, 64: 2, 32: 3}[swizzle_bytes] in swizzles
    assert_right(case, 1e-6, (0, 1, 2, None))


# --- does it fail on wrong code?


def is_caught(
    case: CompiledCase, mutated: str, tolerance: float, seeds: Sequence[int] = SEEDS
) -> bool:
    """Whether some seed gives a wrong result or an error."""
    assert mutated != case.ptx, "the mutation changed nothing"
    program = Program.parse(mutated)
    for seed in seeds:
        try:
            if not case.error(program, seed) <= tolerance:
                return True
        except (MemoryError, RuntimeError):
            return True
    return False


def without(pattern: str, text: str, occurrence: int) -> str:
    match = list(re.finditer(pattern, text))[occurrence]
    return text[: match.start()] + text[match.end() :]


BARRIER = r"\n\s*bar\.sync[^\n]*"
COPY_WAIT = r"\n\s*cp\.async\.wait_group[^\n]*"
MATRIX_WAIT = r"\n\s*wgmma\.wait_group[^\n]*"
BF16 = torch.bfloat16

MUTATED_CASES: dict[str, Callable[[], CompiledCase]] = {
    "sum": lambda: sum_case(80, 4, torch.float32),
    "cumsum": lambda: cumsum_case(80, 4, torch.float32),
    "sort": lambda: sort_case(80, 2, False),
    "matmul": lambda: matmul_case(80, 4, BF16),
    "wgmma": lambda: matmul_case(90, 4, BF16, M=64, N=64, block=64),
}
# The barriers left out here guard nothing: before the first copy, after another barrier, or where
# a conversion back of a layout makes each lane write what it alone has read.
BARRIERS = [
    *(("sum", 0), ("cumsum", 0), ("sort", 0), ("sort", 2)),
    *(("matmul", i) for i in (1, 3, 4, 5, 6)),
    *(("wgmma", i) for i in (1, 2, 3, 4)),
]


@pytest.mark.skipif(
    not triton.__version__.startswith("3.8."),
    reason="the numbers are those of triton 3.8's barriers",
)
@pytest.mark.parametrize(("name", "occurrence"), BARRIERS)
def test_dropped_barrier_is_caught(name: str, occurrence: int) -> None:
    case = MUTATED_CASES[name]()
    assert is_caught(case, without(BARRIER, case.ptx, occurrence), 1e-4)


def test_dropped_load_mask_is_caught() -> None:
    case = add_case(80, 4, torch.float32)
    mutated = re.sub(r"@%p\d+ (?=ld\.global)", "", case.ptx)
    with pytest.raises(MemoryError, match=r"out-of-bounds.*ld\.global.*CTA \(1, 0, 0\)"):
        case.error(Program.parse(mutated), 0)


def test_dropped_store_mask_is_caught() -> None:
    case = add_case(90, 1, torch.float32)
    mutated = re.sub(r"@%p\d+ (?=st\.global)", "", case.ptx)
    with pytest.raises(MemoryError, match=r"out-of-bounds.*st\.global"):
        case.error(Program.parse(mutated), 0)


SWAPS = {
    "A": r"(mma\.sync[^\n]*?\}, \{ )(%r\d+)(, )(%r\d+)",
    "B": r"(mma\.sync[^\n]*?\}, \{[^}]*\}, \{ )(%r\d+)(, )(%r\d+)",
    "D": r"(mma\.sync[^\n]*?\{ )(%r\d+)(, )(%r\d+)",
}


@pytest.mark.parametrize("operand", SWAPS)
def test_swapped_mma_registers_are_caught(operand: str) -> None:
    case = MUTATED_CASES["matmul"]()
    mutated = re.sub(SWAPS[operand], r"\1\4\3\2", case.ptx, count=1)
    assert is_caught(case, mutated, 1e-4, (0,))


@pytest.mark.parametrize("occurrence", [0, 1, 2])
def test_dropped_transpose_is_caught(occurrence: int) -> None:
    case = MUTATED_CASES["matmul"]()
    pattern = r"(?<=ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans"
    assert is_caught(case, without(pattern, case.ptx, occurrence), 1e-4, (0,))


def test_shifted_matrix_load_is_caught() -> None:
    case = MUTATED_CASES["matmul"]()
    mutated = re.sub(r"(ldmatrix[^\n]*\[%r\d+)\]", r"\1+16]", case.ptx, count=1)
    assert is_caught(case, mutated, 1e-4, (0,))


@pytest.mark.parametrize("name", ["matmul", "wgmma"])
@pytest.mark.parametrize("occurrences", ["first", "all"])
def test_dropped_copy_wait_is_caught(name: str, occurrences: str) -> None:
    # Triton waits twice for the same group in the loop: there one wait alone is redundant.
    case = MUTATED_CASES[name]()
    mutated = re.sub(COPY_WAIT, "", case.ptx, count=1 if occurrences == "first" else 0)
    assert is_caught(case, mutated, 1e-4, (0,))


@pytest.mark.parametrize("name", ["matmul", "wgmma"])
def test_dropped_copy_commit_is_caught(name: str) -> None:
    case = MUTATED_CASES[name]()
    assert is_caught(case, without(r"cp\.async\.commit_group;", case.ptx, 2), 1e-4, (0,))


@pytest.mark.parametrize("occurrence", [0, 1])
def test_dropped_wgmma_wait_is_caught(occurrence: int) -> None:
    case = MUTATED_CASES["wgmma"]()
    assert is_caught(case, without(MATRIX_WAIT, case.ptx, occurrence), 1e-4, (0,))


def test_wgmma_without_transpose_is_caught() -> None:
    case = MUTATED_CASES["wgmma"]()
    mutated = re.sub(r"(wgmma\.mma_async[^\n]*), 1;", r"\1, 0;", case.ptx, count=1)
    assert is_caught(case, mutated, 1e-4, (0,))


@pytest.mark.parametrize("name", ["sum", "sort"])
def test_wrong_shuffle_lane_is_caught(name: str) -> None:
    case = MUTATED_CASES[name]()
    mutated = re.sub(r"(shfl\.sync\.bfly\.b32[^\n]*, )1, 31", r"\g<1>2, 31", case.ptx, count=1)
    assert is_caught(case, mutated, 1e-4, (0,))


def test_store_that_never_happens_is_caught() -> None:
    case = MUTATED_CASES["cumsum"]()
    assert is_caught(case, without(r"\n[^\n]*st\.shared[^\n]*", case.ptx, 0), 1e-4, (0,))
