"""Floating-point instructions and predicates of the PTX emulator, against exact fractions."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from gpu_sim.written_ptx import (
    PRECISION,
    apply,
    edges,
    interpreted,
    nearest,
    pairs,
    to_bits,
    to_floats,
)


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
