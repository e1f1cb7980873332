"""Floating-point formats: raw bits to values and back, and the arithmetic that numpy lacks.

Half types are computed in float64 and rounded once: with 53 bits the second rounding of a sum,
product, quotient or square root of 8- or 11-bit numbers cannot be seen (Figueroa 1995).
"""

from collections.abc import Callable

import numpy as np

from gpu_sim.ptx_machine import Array
from gpu_sim.ptx_operands import PtxType

_CANONICAL_NAN = np.uint32(0x7FFFFFFF)


def flush_subnormals(values: Array) -> Array:
    """The .ftz of f32: subnormals become zeros of their sign."""
    tiny = np.abs(values) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def to_bf16(values: Array) -> Array:
    """Rounds f32 or f64 to bfloat16 bits, to nearest even; NaN becomes the canonical 0x7FFF."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        # Round to odd on the way, else two roundings to nearest could differ from one.
        away = np.abs(single) > np.abs(values)
        odd = (bits - away.astype(np.uint32)) | np.uint32(1)
        inexact = (single != values) & np.isfinite(values) & ((bits & np.uint32(1)) == 0)
        bits = np.where(inexact, odd, bits)
    rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def decode_float(raw: Array, ptx_type: PtxType) -> Array:
    """Raw element bits to values: f32 and f64 as they are, half types as float64."""
    if ptx_type.kind == "bf":
        return from_bf16(raw).astype(np.float64)
    if ptx_type.bits == 16:
        return raw.view(np.float16).astype(np.float64)
    return raw.view(ptx_type.dtype)


def encode_float(values: Array, ptx_type: PtxType) -> Array:
    """Values to raw element bits, rounding to nearest even; NaN as NVIDIA's canonical NaN."""
    if ptx_type.kind == "bf":
        return to_bf16(values)
    if ptx_type.bits == 16:
        half = values.astype(np.float16).view(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), half)
    if ptx_type.bits == 64:
        return values.astype(np.float64).view(np.uint64)
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    np.putmask(bits, single != single, _CANONICAL_NAN)
    return bits


_BELOW_F32, _HALF_WAY = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c for f32 or, given as float64, half types: exact enough to be rounded only once."""
    product = a.astype(np.float64) * b
    total = product + c
    # The product is exact, the sum may not be. For f32 that matters only where it falls exactly
    # between two numbers (below 2^-126 too, but there the bits lost lie beyond 2^-179).
    if a.dtype == np.float32:
        suspect = (total.view(np.uint64) & _BELOW_F32) == _HALF_WAY
    else:
        suspect = (total.view(np.uint64) & np.uint64(1)) == 0
    if suspect.any():
        part = total - product
        error = (product - (total - part)) + (c - part)
        suspect &= (error != 0) & np.isfinite(total)
        towards = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(suspect, total.view(np.int64) + towards, total.view(np.int64)).view(
            np.float64
        )
    return total.astype(a.dtype)


def minimum(a: Array, b: Array) -> Array:
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def propagating(select: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, select(a, b)).astype(a.dtype)


def xorsign(select: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def apply(a: Array, b: Array) -> Array:
        negative = np.signbit(a) ^ np.signbit(b)
        magnitude = np.abs(select(np.abs(a), np.abs(b)))
        return np.where(negative, -magnitude, magnitude)

    return apply
