"""Kernels written by hand in PTX, and exact values to compare the emulator with.

Every kernel must also be accepted by ptxas, so that no test is about illegal PTX. References are
Python integers, exact fractions or torch, never the emulator's own helpers.
"""

import itertools
import math
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from gpu_sim.ptx_emulator import Counters, Program, run

Array = np.ndarray
SEEDS = range(8)
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


def edges(bits: int) -> list[int]:
    top = 1 << bits
    return [0, 1, 2, 7, 31, 32, 33, 100, top // 2 - 1, top // 2, top // 2 + 5, top - 1, top - 7]


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def interpreted(values: Array, type_name: str) -> list[int]:
    bits = int(type_name[1:])
    return [signed(int(v), bits) if type_name[0] == "s" else int(v) for v in values]


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
