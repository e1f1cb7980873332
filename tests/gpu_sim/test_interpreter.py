"""The interpreter computes what a GPU would, and refuses what a GPU would not forgive."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_sim import interpreter
from gpu_sim.interpreter import MemoryFault, interpret

# A GPU rounds to the nearest bfloat16, and so does torch: results are compared as bits.
ALL_BITS = torch.arange(65536, dtype=torch.int32)


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, every NaN included."""
    return ALL_BITS.to(torch.uint16).view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal as bits; NaNs may differ in payload, which no rounding rule fixes."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    kept = ~expected.isnan()
    bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual[kept].view(bits), expected[kept].view(bits))


def random_values(dtype: torch.dtype, *shape: int) -> Tensor:
    """Values over many binades, so that rounding, signs and comparisons all matter."""
    return (torch.randn(*shape) * torch.exp(2 * torch.randn(*shape))).to(dtype)


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "min":
        out = tl.minimum(x, y)
    elif OP == "plus_half":
        out = x + 0.5
    elif OP == "clamp":
        out = tl.clamp(x, -1.5, 0.75)
    elif OP == "clamp_nan":
        out = tl.clamp(x, -1.5, 0.75, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "where":
        out = tl.where(x > y, x, -y)
    tl.store(out_ptr + offsets, out, mask=mask)


@triton.jit
def compare_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    bits = (x < y).to(tl.int32) + (x <= y).to(tl.int32) * 2 + (x > y).to(tl.int32) * 4
    bits += (x >= y).to(tl.int32) * 8 + (x == y).to(tl.int32) * 16 + (x != y).to(tl.int32) * 32
    tl.store(out_ptr + offsets, bits, mask=mask)


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    columns = tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + rows * N + columns)
    y = tl.load(y_ptr + rows * N + columns)
    tl.store(out_ptr + rows * N + columns, tl.dot(x, y))


@triton.jit
def row_moments(x):
    """A device function: called from kernels, in the interpreter and when compiled."""
    wide = x.to(tl.float32)
    return tl.sum(wide, axis=1), tl.max(wide, axis=1)


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, R: tl.constexpr, C: tl.constexpr):
    rows = tl.arange(0, R)
    x = tl.load(x_ptr + rows[:, None] * C + tl.arange(0, C)[None, :])
    total, largest = row_moments(x)
    tl.store(sum_ptr + rows, total)
    tl.store(max_ptr + rows, largest)


@triton.jit
def narrow_sum_kernel(x_ptr, out_ptr, C: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, C)), axis=0))


@triton.jit
def maskless_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def maskless_store_kernel(out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.full((BLOCK,), 1.0, tl.float32))


@triton.jit
def overlapping_kernel(out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i_block = tl.program_id(0) * 2 + tl.program_id(1)
    offsets = i_block * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.full((BLOCK,), 1.0, tl.float32))


@triton.jit
def neighbour_kernel(x_ptr, OFFSET: tl.constexpr):
    i = tl.program_id(0)
    tl.store(x_ptr + i + 1, tl.load(x_ptr + i + 1 + OFFSET))


@triton.jit
def pair_kernel(x_ptr, out_ptr, apart):
    """The second store aims at the second element of `out`, by way of `x`."""
    tl.store(out_ptr, 1.0)
    tl.store(x_ptr + apart + 1, 2.0)


@triton.jit
def accumulate_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(out_ptr, x)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + x)


@triton.jit
def scatter_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes // 2, tl.load(x_ptr + lanes))


@triton.jit
def twice_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Loads every element twice, and element 0 once more in each program."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask) + tl.load(x_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + tl.load(x_ptr), mask=mask)


def launch_binary(op: str, x: Tensor, y: Tensor, sanitize: bool = True) -> Tensor:
    out = torch.empty_like(x)
    with interpret(sanitize=sanitize):
        binary_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), OP=op, BLOCK=1024)
    return out


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "max": torch.maximum,
    "min": torch.minimum,
    "plus_half": lambda x, y: x + 0.5,
    "clamp": lambda x, y: x.clamp(-1.5, 0.75),
    "clamp_nan": lambda x, y: x.clamp(-1.5, 0.75),
    "where": lambda x, y: torch.where(x > y, x, -y),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", EXPECTED)
def test_arithmetic_is_that_of_torch_bit_by_bit(op: str, dtype: torch.dtype) -> None:
    x, y = random_values(dtype, 5000), random_values(dtype, 5000)
    assert_same_bits(launch_binary(op, x, y), EXPECTED[op](x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_plus_another(dtype: torch.dtype) -> None:
    x = all_patterns(dtype)
    y = x[torch.randperm(65536)]
    assert_same_bits(launch_binary("add", x, y), x + y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_comparisons(dtype: torch.dtype) -> None:
    x = all_patterns(dtype)
    y = torch.where(ALL_BITS % 3 == 0, x, x[torch.randperm(65536)])
    out = torch.empty(65536, dtype=torch.int32)
    with interpret():
        compare_kernel[(16,)](x, y, out, 65536, BLOCK=4096)
    results = (x < y, x <= y, x > y, x >= y, x == y, x != y)
    assert torch.equal(out, sum(r.int() << i for i, r in enumerate(results)))


def cast(x: Tensor, dtype: torch.dtype, sanitize: bool = True) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    with interpret(sanitize=sanitize):
        cast_kernel[(triton.cdiv(x.numel(), 65536),)](x, out, x.numel(), BLOCK=65536)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    x = all_patterns(dtype)
    assert_same_bits(cast(x, torch.float32), x.float())


# Below, just below, at, just above the middle between two neighbours, and just below the next.
@pytest.mark.parametrize("low_bits", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_to_bfloat16_is_to_nearest_even(low_bits: int) -> None:
    x = (all_patterns(torch.bfloat16).view(torch.int16).int() << 16 | low_bits).view(torch.float32)
    expected = x.bfloat16()
    assert_same_bits(cast(x, torch.bfloat16), expected)
    if low_bits == 0x8000:  # torch must be right for this to prove anything
        finite = expected[expected.isfinite() & x.isfinite()]
        assert bool((finite.view(torch.int16) & 1 == 0).all())


def test_rounding_to_float16_is_to_nearest_even() -> None:
    halves = all_patterns(torch.float16)
    halves = halves[halves.isfinite()].float().sort().values
    middles = (halves[1:] + halves[:-1]) / 2  # exact in float32
    x = torch.cat([middles, middles.nextafter(halves[1:]), middles.nextafter(halves[:-1])])
    assert_same_bits(cast(x, torch.float16), x.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_casts_to_bfloat16_from_other_types(dtype: torch.dtype) -> None:
    x = (random_values(torch.float32, 4096) * 100).to(dtype)
    assert_same_bits(cast(x, torch.bfloat16), x.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    out = torch.empty(32, 32)
    with interpret():
        dot_kernel[(1,)](x, y, out, N=32)
    torch.testing.assert_close(out, (x.double() @ y.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reductions_in_a_device_function(dtype: torch.dtype) -> None:
    x = random_values(dtype, 16, 64)
    total, largest = torch.empty(16), torch.empty(16)
    with interpret():
        reduce_kernel[(1,)](x, total, largest, R=16, C=64)
    torch.testing.assert_close(total, x.double().sum(1).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(largest, x.float().amax(1))


def test_a_reduction_of_bfloat16_itself_is_refused() -> None:
    x, out = torch.ones(64, dtype=torch.bfloat16), torch.empty(1)
    with interpret(), pytest.raises(TypeError, match="cast to float32 first"):
        narrow_sum_kernel[(1,)](x, out, C=64)


def test_upstream_is_still_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for our own bfloat16: when this fails, upstream may have made it unnecessary."""
    x = torch.tensor([1.0, 1.0 + 2**-7, 3.0]).bfloat16()
    monkeypatch.setattr(interpreter, "CheckedBuilder", upstream.InterpreterBuilder)
    message = "Triton's interpreter now {}: try to remove the bfloat16 part of interpreter.py"
    assert not torch.equal(launch_binary("add", x, x, sanitize=False), x + x), message.format(
        "adds bfloat16"
    )
    between = torch.tensor([1.0 + 2**-8 + 2**-12])
    rounded = cast(between, torch.bfloat16, sanitize=False)
    assert not torch.equal(rounded, between.bfloat16()), message.format("rounds to bfloat16")


def test_access_out_of_bounds_is_refused() -> None:
    x, out = torch.randn(100), torch.zeros(128)
    with interpret() as report, pytest.raises(MemoryFault) as raised:
        maskless_kernel[(4,)](x, out, BLOCK=32)
    assert str(raised.value) == ("maskless_kernel, program (3, 0, 0): load out of bounds, 28 lanes")
    assert len(report.faults) == 1
    with interpret(), pytest.raises(MemoryFault, match="store out of bounds, 28 lanes"):
        maskless_store_kernel[(4,)](torch.zeros(100), BLOCK=32)


def test_no_offset_leads_from_one_tensor_into_another() -> None:
    x, out = torch.randn(64), torch.zeros(64)
    apart = (out.data_ptr() - x.data_ptr()) // 4
    with interpret(), pytest.raises(MemoryFault, match="load out of bounds, 1 lanes"):
        neighbour_kernel[(1,)](x, OFFSET=apart)
    with interpret(raise_on_fault=False) as report:
        pair_kernel[(1,)](x, out, apart)
    assert [fault.kind for fault in report.faults] == ["store out of bounds"]
    assert torch.equal(out[:2], torch.tensor([1.0, 0.0]))


def test_faults_are_collected_if_asked_for() -> None:
    x, out = torch.randn(100), torch.zeros(128)
    with interpret(raise_on_fault=False) as report:
        maskless_kernel[(5,)](x, out, BLOCK=32)
    assert [(f.program[0], f.kind, f.lanes) for f in report.faults] == [
        (3, "load out of bounds", 28),
        (4, "load out of bounds", 32),
        (4, "store out of bounds", 32),
    ]
    # Lanes out of bounds are masked off: nothing was read from, or written to, other memory.
    assert torch.equal(out[:100], x)
    assert not out[100:].any()
    assert report.launches[0].loaded.bytes == 400
    assert report.launches[0].stored.bytes == 512


def test_programs_that_write_the_same_byte() -> None:
    with interpret():
        overlapping_kernel[(2, 2)](torch.zeros(128), STEP=32, BLOCK=32)
    with interpret(), pytest.raises(MemoryFault) as raised:
        overlapping_kernel[(2, 2)](torch.zeros(128), STEP=31, BLOCK=32)
    assert str(raised.value) == (
        "overlapping_kernel, program (0, 1, 0): writes what another program wrote, 1 lanes "
        "(the other is program (0, 0, 0))"
    )


# Read before written and read after written are one race: programs run in no order.
@pytest.mark.parametrize(
    ("offset", "kind"),
    [(-1, "reads what another program wrote"), (1, "writes what another program reads")],
)
def test_programs_that_read_what_another_writes(offset: int, kind: str) -> None:
    with interpret():
        neighbour_kernel[(8,)](torch.zeros(10), OFFSET=0)
    with interpret(), pytest.raises(MemoryFault, match=rf"program \(1, 0, 0\): {kind}, 1 lanes"):
        neighbour_kernel[(8,)](torch.zeros(10), OFFSET=offset)


def test_atomics_may_share_a_byte_and_plain_accesses_may_not() -> None:
    x, out = torch.randn(8), torch.zeros(1)
    with interpret() as report:
        accumulate_kernel[(8,)](x, out, ATOMIC=True)
    torch.testing.assert_close(out, x.sum()[None])
    assert (report.launches[0].atomic.bytes, report.launches[0].atomic.distinct_bytes) == (32, 4)
    with interpret(), pytest.raises(MemoryFault, match="reads what another program wrote"):
        accumulate_kernel[(8,)](x, out, ATOMIC=False)


def test_a_store_whose_lanes_disagree() -> None:
    x = torch.randn(32).repeat_interleave(2)
    with interpret():
        scatter_kernel[(1,)](x, torch.zeros(32), BLOCK=64)
    x[7] += 1
    with interpret(), pytest.raises(MemoryFault, match="lanes of one store write different values"):
        scatter_kernel[(1,)](x, torch.zeros(32), BLOCK=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bytes_are_counted_exactly(dtype: torch.dtype) -> None:
    n, programs, size = 1000, 8, dtype.itemsize
    x, out = torch.randn(n).to(dtype), torch.empty(n, dtype=dtype)
    with interpret() as report:
        twice_kernel[(programs,)](x, out, n, BLOCK=128)
        twice_kernel[(programs,)](x, out, n // 2, BLOCK=64)
    first, second = report.launches
    assert (first.kernel, first.grid) == ("twice_kernel", (programs, 1, 1))
    assert first.loaded.bytes == (2 * n + programs) * size
    assert second.loaded.bytes == (n + programs) * size
    assert (first.loaded.distinct_bytes, second.loaded.distinct_bytes) == (n * size, n // 2 * size)
    assert first.stored.bytes == first.stored.distinct_bytes == n * size
    assert report.loaded_bytes == report.stored_bytes == (n + n // 2) * size


def test_views_of_one_storage() -> None:
    """The bounds are those of the storage, which may be larger than the view."""
    buffer = torch.randn(96)
    with interpret() as report:
        maskless_kernel[(2,)](buffer[:16], torch.empty(64), BLOCK=32)
    assert report.loaded_bytes == 256
    with interpret(), pytest.raises(MemoryFault, match="load out of bounds, 16 lanes"):
        maskless_kernel[(2,)](buffer[48:], torch.empty(64), BLOCK=32)


def test_a_kernel_that_closes_over_its_surroundings() -> None:
    scale: tl.constexpr = tl.constexpr(3)

    @triton.jit
    def scale_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, tl.load(x_ptr + offsets) * scale)

    x, out = torch.randn(32), torch.empty(32)
    with interpret(sanitize=False) as report:
        scale_kernel[(1,)](x, out, BLOCK=32)
    assert torch.equal(out, x * 3)
    assert not report.launches


def watched_state() -> dict[str, object]:
    """Whatever interpreting touches, as far as it can be seen."""
    return {
        "globals": set(globals()),
        "run": triton.runtime.jit.JITFunction.run,
        "call": triton.runtime.jit.JITFunction.__call__,
        "builder": type(upstream.interpreter_builder),
        "builder state": set(vars(upstream.interpreter_builder)) - {"grid_dim", "grid_idx"},
        "arguments": upstream._implicit_cvt,
        "reductions": upstream.ReduceScanOpInterface.check_tensor,
        "language": {name: id(value) for name, value in vars(tl).items()},
        "core": {name: id(value) for name, value in vars(tl.core).items()},
        "tensor": {name: id(value) for name, value in vars(tl.tensor).items()},
        "knobs": (triton.knobs.runtime.interpret, triton.knobs.compilation.front_end_debugging),
        "environment": dict(os.environ) | {"PYTEST_CURRENT_TEST": ""},
        "hash of a kernel": binary_kernel.hash,
    }


def test_everything_is_restored() -> None:
    x = torch.randn(64)
    before = watched_state()
    with interpret():
        inside = watched_state()
        assert triton.knobs.runtime.interpret
        reduce_kernel[(1,)](x, torch.empty(4), torch.empty(4), R=4, C=16)
    assert inside != before
    assert watched_state() == before
    assert "sanitizer" not in vars(upstream.interpreter_builder)
    with pytest.raises(MemoryFault), interpret():
        maskless_kernel[(3,)](x, torch.empty(64), BLOCK=32)
    assert watched_state() == before


def test_nesting() -> None:
    x, out = torch.randn(32).bfloat16(), torch.empty(32, dtype=torch.bfloat16)
    before = watched_state()
    with interpret() as outer:
        cast_kernel[(1,)](x, out, 32, BLOCK=32)
        with interpret() as inner:
            binary_kernel[(1,)](x, x, out, 32, OP="add", BLOCK=32)
        assert torch.equal(out, x + x)
        cast_kernel[(1,)](x, out, 32, BLOCK=32)
        with pytest.raises(MemoryFault), interpret(raise_on_fault=True):
            maskless_kernel[(2,)](x, out, BLOCK=32)
        binary_kernel[(1,)](x, x, out, 32, OP="mul", BLOCK=32)
        assert torch.equal(out, x * x)
    assert [launch.kernel for launch in outer.launches] == [
        "cast_kernel",
        "cast_kernel",
        "binary_kernel",
    ]
    assert [launch.kernel for launch in inner.launches] == ["binary_kernel"]
    assert watched_state() == before


# Printed by a process of its own, and compared with that of this process after interpreting.
COMPILE_ALONE = """
import sys
import triton
sys.path.insert(0, {tests!r})
from gpu_sim.test_interpreter import compiled_ptx
print(compiled_ptx())
"""


def compiled_ptx() -> str:
    """PTX of a kernel that calls device functions, ours and Triton's; never from the cache."""
    source = ASTSource(
        fn=reduce_kernel,
        signature={"x_ptr": "*bf16", "sum_ptr": "*fp32", "max_ptr": "*fp32"}
        | {"R": "constexpr", "C": "constexpr"},
        constexprs={"R": 16, "C": 64},
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


def test_interpreting_first_does_not_change_what_is_compiled() -> None:
    tests = str(Path(__file__).parents[1])
    program = COMPILE_ALONE.format(tests=tests)
    alone = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    with interpret():
        reduce_kernel[(1,)](torch.randn(1024), torch.empty(16), torch.empty(16), R=16, C=64)
    assert compiled_ptx().strip() == alone.strip()
    assert ".visible .entry reduce_kernel" in alone
