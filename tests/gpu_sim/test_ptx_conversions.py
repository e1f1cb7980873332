"""Conversions of the PTX emulator: rounding, saturation, widening."""

import math
from fractions import Fraction

import numpy as np
import pytest

from gpu_sim.written_ptx import PRECISION, apply, edges, interpreted, nearest, to_floats


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
