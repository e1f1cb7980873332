"""Integer instructions of the PTX emulator against Python integers."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpu_sim.written_ptx import apply, edges, interpreted, pairs, signed


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
