"""Kernels that Triton compiled, in the PTX emulator: what is right passes, what is wrong fails."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from gpu_sim.emulation import execute
from gpu_sim.ptx_emulator import Program
from pairwise import pairwise
from simmim_kernels.report.ahead_of_time import Launch, capture

SEEDS = range(8)


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
