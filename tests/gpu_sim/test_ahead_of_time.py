"""Launches are captured as the GPU would get them, and the report reads their code rightly."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpu_sim.interpreter import interpret
from simmim_kernels.report.ahead_of_time import TARGETS, Launch, capture
from simmim_kernels.report.cards import CARDS, occupancy
from simmim_kernels.report.cases import Case
from simmim_kernels.report.command import main
from simmim_kernels.report.figures import amd_resources, case_figures, compile_case, kernel_figures
from simmim_kernels.report.golden import differences
from simmim_kernels.report.machine_code import read_amdgcn, read_sass
from simmim_kernels.report.printing import as_json

BFLOAT16 = torch.bfloat16


@triton.jit
def doubled(x):
    """A device function."""
    return x.to(tl.float32) * 2


@triton.jit
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, doubled(tl.load(x_ptr + offsets, mask=mask)), mask=mask)


@triton.jit
def many_arguments_kernel(
    flag, x_ptr, one, BLOCK: tl.constexpr, scale, missing_ptr, out_ptr, large, offset=32
):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes * one + offset).to(tl.float32) * scale
    if missing_ptr is not None:
        x += tl.load(missing_ptr + lanes)
    if flag:
        x += (large % 7).to(tl.float32)
    tl.store(out_ptr + lanes, x)


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + tl.program_id(0) * n + offsets, mask=offsets < n, other=0.0)
        total += x.to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def matmul_chain_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    """At N = 128 its tiles are far more than the registers of 4 warps."""
    rows = tl.arange(0, N)
    at = rows[:, None] * N + rows[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    xy, yx = tl.dot(x, y), tl.dot(y, x)
    third = tl.dot((xy / (1 + tl.sum(yx, 1)[:, None])).to(x.dtype), y)
    tl.store(out_ptr + at, third * xy + yx)


def double(x: Tensor) -> Tensor:
    """A launch function, written as those of the ops."""
    out = torch.empty_like(x)
    double_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](
        x, out, x.numel(), BLOCK=1024, num_warps=4
    )
    return out


def row_sum(rows: int, columns: int) -> None:
    x, out = torch.empty(rows, columns, dtype=BFLOAT16), torch.empty(rows)
    row_sum_kernel[(rows,)](x, out, columns, BLOCK=1024, num_warps=4)


def matmul_chain(side: int) -> None:
    x, y = torch.empty(2, side, side, dtype=BFLOAT16)
    matmul_chain_kernel[(1,)](x, y, torch.empty(side, side), N=side, num_warps=4)


def captured(target: str, x: Tensor) -> Launch:
    with capture(target) as launches:
        double(x)
    return launches[0]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles(target: str) -> None:
    launch = captured(target, torch.empty(64 * 2304, 128, dtype=BFLOAT16))
    assert (launch.kernel, launch.target) == ("double_kernel", target)
    assert launch.grid == (18432, 1, 1)
    assert launch.num_warps == 4
    assert launch.constants == {"BLOCK": 1024}
    if target == "gfx942":
        assert re.search(r'amdgcn_target "\S+-gfx942"', launch.compiled.asm["amdgcn"])
    else:
        suffix = "" if target == "sm_80" else "a"
        assert f".target {target}{suffix}" in launch.compiled.asm["ptx"]
        assert launch.compiled.asm["cubin"][:4] == b"\x7fELF"


# Triton specialises on the address and the size: the same kernel for other tensors is other code.
@pytest.mark.parametrize(
    ("size", "start", "width"),
    [(4096, 0, "v4.b32"), (4096, 8, "v4.b32"), (4090, 0, "b16"), (4096, 1, "b16")],
)
def test_specialisation_is_that_of_a_launch(size: int, start: int, width: str) -> None:
    launch = captured("sm_90", torch.empty(start + size, dtype=BFLOAT16)[start:])
    loads = set(re.findall(r"ld\.global\.(\w+(?:\.\w+)?)", launch.compiled.asm["ptx"]))
    assert loads == {width}


def test_arguments_are_those_of_the_entry_point() -> None:
    x, out = torch.empty(256, dtype=BFLOAT16), torch.empty(64)
    with capture("sm_80") as launches:
        many_arguments_kernel[(2, 3)](
            True, x, 1, scale=0.5, missing_ptr=None, BLOCK=64, large=2**40 + 1, out_ptr=out
        )
    launch = launches[0]
    assert launch.grid == (2, 3, 1)
    assert launch.argument_names == ["flag", "x_ptr", "scale", "out_ptr", "large", "offset"]
    assert launch.argument_types == ["u1", "*bf16", "fp32", "*fp32", "i64", "i32"]
    assert launch.arguments == [1, x.data_ptr(), 0.5, out.data_ptr(), 2**40 + 1, 32]
    assert launch.constants == {"one": 1, "BLOCK": 64, "missing_ptr": None}
    assert launch.tensors[0] is x
    assert launch.tensors[1] is out
    header = launch.compiled.asm["ptx"].split(".visible .entry", 1)[1].split(")", 1)[0]
    bits = re.findall(r"\.param \.[a-z](\d+)", header)
    scratch = ["64", "64"]
    assert bits == ["8", "64", "32", "64", "64", "32", *scratch]


def test_nothing_runs_and_on_launch_stands_in_for_the_gpu() -> None:
    seen: list[str] = []

    def emulate(launch: Launch) -> None:
        x, out = launch.tensors
        assert [x.data_ptr(), out.data_ptr(), x.numel()] == launch.arguments
        out.copy_(2 * x)
        seen.append(launch.kernel)

    x = torch.randn(1024)
    with capture("sm_90", on_launch=emulate) as launches:
        out = double(double(x))
        assert len(launches) == 2
    assert seen == ["double_kernel", "double_kernel"]
    assert torch.equal(out, 4 * x)
    untouched = torch.zeros(1024)
    with capture("sm_90"):
        double_kernel[(1,)](x, untouched, 1024, BLOCK=1024)
    assert not untouched.any()


def test_everything_is_restored() -> None:
    mine = object()
    before = driver._active, JITFunction.run
    try:
        driver._active = mine
        with capture("sm_80"):
            double(torch.empty(64))
        assert driver._active is mine
        with pytest.raises(ZeroDivisionError), capture("sm_80"):
            double(torch.empty(64 // 0))
        assert driver._active is mine
    finally:
        driver._active = before[0]
    assert before[1] is JITFunction.run
    # A real device finds its kernels by index, and must not find one that was never loaded.
    assert all(isinstance(key, str) for key in double_kernel.device_caches)


def test_capture_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="unknown target 'sm_70'; known are sm_80, sm_90"):
        capture("sm_70").__enter__()
    with interpret(), pytest.raises(RuntimeError, match="interpreter"):
        capture("sm_80").__enter__()
    with capture("sm_80"), pytest.raises(RuntimeError, match="inside itself"):
        capture("sm_90").__enter__()


def test_interpreting_and_capturing_take_turns() -> None:
    x = torch.randn(300).bfloat16()
    first = captured("sm_80", x).compiled.asm["ptx"]
    with interpret():
        assert torch.equal(double(x), 2 * x)
    assert captured("sm_80", x).compiled.asm["ptx"] == first
    with interpret():
        assert torch.equal(double(x), 2 * x)


SASS = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.U8 R3, desc[UR4][R2.64] ;
        /*0018*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/               @P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.64 [R5], desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   REDUX.SUM UR5, R3 ;
        /*0090*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R3 ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP;
"""

AMDGCN = """
some_kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	global_load_ubyte v0, v[2:3], off
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[4:7], v1, s[0:3], 0 offen
	global_load_dword v8, v[2:3], off
	v_mfma_f32_32x32x8_bf16 a[0:15], v[4:5], v[6:7], a[0:15]
	s_cbranch_scc1 .LBB0_1
	buffer_store_short v8, v1, s[0:3], 0 offen
	global_atomic_add_f32 v0, v1, s[0:1]
	s_endpgm
"""


def test_reading_sass() -> None:
    code = read_sass(SASS)
    assert code.loads.widths == {1: 1, 2: 1, 4: 1, 8: 1, 16: 1}
    # In the loop are 26 bytes: 2 of them are no quarter, 8 are.
    assert code.loads.narrowest == 8
    assert (code.stores.widths, code.stores.narrowest) == ({4: 1}, 4)
    assert code.tensor_ops == {"HMMA.16816.F32.BF16": 1}
    assert code.atomics == 1
    assert code.instructions == 14
    without_loop = read_sass(SASS.replace("@P0 BRA `(.L_x_0)", "@P0 BRA `(.L_x_1)"))
    assert without_loop.loads.narrowest == 8  # of 31 bytes
    narrow = read_sass(SASS.replace("E.128.CONSTANT", "E.U16.CONSTANT"))
    assert narrow.loads.narrowest == 2


def test_reading_amd_assembly() -> None:
    code = read_amdgcn(AMDGCN)
    assert code.loads.widths == {1: 1, 4: 1, 16: 1}
    assert code.loads.narrowest == 16  # 4 of 21 bytes are no quarter
    assert code.stores.widths == {2: 1}
    assert code.tensor_ops == {"v_mfma_f32_32x32x8_bf16": 1}
    assert code.atomics == 1
    assert code.instructions == 9
    metadata = ".private_segment_fixed_size: 24\n.vgpr_count:     96\n.vgpr_spill_count: 5\n"
    assert amd_resources(metadata) == (96, 24)
    with pytest.raises(RuntimeError, match="vgpr_count"):
        amd_resources("")


# By hand from the tables of the CUDA programming guide and the CDNA 3 ISA.
@pytest.mark.parametrize(
    ("target", "registers", "num_warps", "shared_bytes", "expected"),
    [
        ("sm_80", 32, 4, 0, 1.0),
        ("sm_80", 32, 1, 0, 0.5),  # 32 programs at most
        ("sm_80", 128, 4, 0, 0.25),
        ("sm_80", 129, 1, 0, 12 / 64),  # 136 registers are allocated: 15 warps, in fours
        ("sm_90", 255, 4, 0, 0.125),
        ("sm_90", 40, 4, 48 << 10, 0.25),  # 49 KiB with the system's: 4 programs
        ("sm_80", 40, 4, 164 << 10, 0.0),
        ("gfx942", 64, 4, 0, 1.0),
        ("gfx942", 65, 4, 0, 28 / 32),
        ("gfx942", 256, 4, 0, 0.25),
        ("gfx942", 64, 4, 40 << 10, 0.125),
    ],
)
def test_occupancy(
    target: str, registers: int, num_warps: int, shared_bytes: int, expected: float
) -> None:
    assert occupancy(target, registers, num_warps, shared_bytes) == expected


def case(name: str, make: Any, **changes: Any) -> Case:
    plain = Case("op", name, "bfloat16", make, bytes_needed=1000, bytes_moved=1000)
    return replace(plain, **changes)


def figures(one: Case, target: str) -> dict[str, Any]:
    """As they stand in a golden file."""
    return json.loads(as_json([case_figures(one, target, compile_case(one, target))]))


def ptxas_verbose(launch: Launch, folder: Path) -> str:
    """What ptxas itself says of the PTX: another source than the tools that the report runs."""
    (folder / "kernel.ptx").write_text(launch.compiled.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(
    not triton.__version__.startswith("3.8."),
    reason="reads where triton 3.8 leaves ptxas's options",
)
@pytest.mark.parametrize("side", [32, 128])
def test_registers_and_spills_are_what_ptxas_says(side: int, tmp_path: Path) -> None:
    (launch,) = compile_case(case("chain", lambda: matmul_chain(side)), "sm_90")
    said = ptxas_verbose(launch, tmp_path)
    found = kernel_figures(launch)
    assert found.registers == int(re.search(r"Used (\d+) registers", said)[1])
    assert found.spill_bytes == int(re.search(r"(\d+) bytes stack frame", said)[1])
    assert (found.spill_bytes > 0) == (int(re.search(r"(\d+) bytes spill stores", said)[1]) > 0)
    assert (found.spill_bytes > 0) == (side == 128)


@pytest.mark.parametrize(
    ("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma")]
)
def test_figures_of_a_real_kernel(target: str, opcode: str) -> None:
    (launch,) = compile_case(case("chain", lambda: matmul_chain(64)), target)
    found = kernel_figures(launch)
    assert found.tensor_ops
    assert all(op.startswith(opcode) for op in found.tensor_ops)
    assert found.spill_bytes == 0
    assert found.shared_bytes == launch.shared_bytes > 0
    assert 0 < found.occupancy <= 1
    assert found.instructions > 100
    lanes = found.num_warps * TARGETS[target].warp_size
    # No loop and no mask: width x instructions x lanes are the bytes of the tensors.
    assert sum(w * n for w, n in found.loads.widths.items()) * lanes == 2 * 64 * 64 * 2
    assert sum(w * n for w, n in found.stores.widths.items()) * lanes == 64 * 64 * 4
    assert found.loads.narrowest == 16


def test_a_spill_is_refused() -> None:
    good = figures(case("chain", lambda: matmul_chain(64)), "sm_90")
    assert differences(good, good) == []
    spilling = figures(case("chain", lambda: matmul_chain(128)), "sm_90")
    problems = differences(spilling, spilling)  # no golden file excuses it
    assert len(problems) == 1
    assert re.fullmatch(
        r"op/chain/bfloat16 sm_90 matmul_chain_kernel: spills \d+ bytes per thread", problems[0]
    )


@pytest.mark.parametrize(("target", "narrow"), [("sm_80", 2), ("sm_100", 2)])
def test_narrow_loads_are_refused(target: str, narrow: int) -> None:
    wide = figures(case("sum", lambda: row_sum(64, 2048)), target)
    odd = figures(case("sum", lambda: row_sum(64, 2047)), target)
    assert differences(wide, wide) == []
    expected = f"row_sum_kernel: loads of {narrow} bytes on the hot path, golden 16"
    assert f"op/sum/bfloat16 {target} {expected}" in differences(wide, odd)
    assert not [d for d in differences(odd, wide) if "hot path" in d]


def one_launch() -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of a good kernel, and the entry of its launch for a test to change."""
    found = figures(case("double", lambda: double(torch.empty(4096, dtype=BFLOAT16))), "sm_90")
    return found, found["cases"][0]["launches"][0]


@pytest.mark.parametrize("kind", ["registers", "instructions"])
def test_growth_is_refused_beyond_a_tenth(kind: str) -> None:
    golden, before = one_launch()
    now, after = one_launch()
    before[kind], after[kind] = 100, 110
    assert differences(golden, now) == []
    after[kind] = 111
    expected = f"op/double/bfloat16 sm_90 double_kernel: 111 {kind}, golden 100 (+11%)"
    assert differences(golden, now) == [expected]
    after[kind] = 50
    assert differences(golden, now) == []


def test_shared_memory_and_bytes_are_bounded() -> None:
    golden, launch = one_launch()
    launch["shared_bytes"] = 99 << 10
    golden["cases"][0]["bytes_ratio"] = 1.05
    assert differences(golden, golden) == []
    launch["shared_bytes"] += 1
    golden["cases"][0]["bytes_ratio"] = 1.051
    assert differences(golden, golden) == [
        "op/double/bfloat16 sm_90: moves 1.051 of the fewest bytes possible",
        "op/double/bfloat16 sm_90 double_kernel: 101377 bytes of shared memory, more than the "
        "101376 that every GPU has",
    ]


def test_cases_and_launches_are_matched() -> None:
    golden, _ = one_launch()
    now, launch = one_launch()
    launch["kernel"] = "other_kernel"
    assert differences(golden, now) == [
        "op/double/bfloat16 sm_90: launches other_kernel; golden double_kernel"
    ]
    now, _ = one_launch()
    now["cases"][0]["case"] = "op/another/bfloat16"
    assert differences(golden, now) == [
        "op/double/bfloat16 sm_90: in the golden file, and no longer reported",
        "op/another/bfloat16 sm_90: not in the golden file",
    ]
    now["cases"][0]["target"] = "sm_80"  # sm_90 was not asked for
    assert differences(golden, now) == ["op/another/bfloat16 sm_80: not in the golden file"]


def test_bytes_and_time_are_modelled() -> None:
    x = torch.empty(1 << 20, dtype=BFLOAT16)
    one = case("double", lambda: double(x), bytes_needed=4 << 20, bytes_moved=None)
    found = case_figures(one, "sm_90", compile_case(one, "sm_90"))
    assert found.bytes_moved == 2 * x.nbytes  # x in and out: each tensor of the launch once
    assert found.bytes_ratio == 1.0
    assert found.modelled_us == pytest.approx((4 << 20) / CARDS["sm_90"].bandwidth * 1e6, abs=0.01)


def known_cases(columns: int = 2048) -> list[Case]:
    return [
        case("sum", lambda: row_sum(64, columns)),
        case("double", lambda: double(torch.empty(100_000, dtype=BFLOAT16)), op="other"),
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = str(tmp_path / "golden.json")
    assert main(["--target", "sm_90", "gfx942", "--json", golden], known_cases()) == 0
    table = capsys.readouterr().out
    assert "not run on a GPU" in table
    for word in ("compiled:", "modelled:", "op/sum/bfloat16", "other/double/bfloat16", "sm_90"):
        assert word in table
    assert "sm_80" not in table
    assert main(["--target", "sm_90", "--check", golden], known_cases()) == 0
    capsys.readouterr()
    assert main(["--target", "sm_90", "--check", golden], known_cases(columns=2047)) == 1
    assert "loads of 2 bytes on the hot path, golden 16" in capsys.readouterr().err
    # Only what is chosen is compiled and compared.
    chosen = ["--op", "other", "--target", "sm_90", "--check", golden]
    assert main(chosen, known_cases(columns=2047)) == 0
    assert "op/sum" not in capsys.readouterr().out
    assert main(["--op", "other", "--target", "sm_90", "--json"], known_cases()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["label"] == "compiled ahead of time and modelled, not run on a GPU"
    assert [one["case"] for one in printed["cases"]] == ["other/double/bfloat16"]
    with pytest.raises(SystemExit):
        main(["--check", str(tmp_path / "missing.json")], known_cases())
    assert "missing.json" in capsys.readouterr().err


def test_exported_launches_can_be_replayed(tmp_path: Path) -> None:
    x = torch.empty(5000, dtype=BFLOAT16)

    def make() -> None:
        double_kernel[(5,)](x[8:], x, 1000, BLOCK=1024)

    one = case("double", make)
    assert main(["--target", "sm_80", "--export", str(tmp_path / "out")], [one]) == 0
    stem = tmp_path / "out" / "op-double-bfloat16-sm_80-0-double_kernel"
    ptx = stem.with_suffix(".ptx").read_text()
    assert ".visible .entry double_kernel(" in ptx
    replay = json.loads(stem.with_suffix(".json").read_text())
    assert (replay["kernel"], replay["grid"]) == ("double_kernel", [5, 1, 1])
    assert (replay["threads"], replay["shared_bytes"]) == (128, 0)
    assert replay["constants"] == {"BLOCK": "1024"}
    tensor = {"type": "*bf16", "strides": [1], "storage": 0, "storage_bytes": 10_000}
    assert replay["arguments"] == [
        {"name": "x_ptr", "shape": [4992], "byte_offset": 16} | tensor,
        {"name": "out_ptr", "shape": [5000], "byte_offset": 0} | tensor,
        {"name": "n", "type": "i32", "value": 1000},
    ]


def test_a_case_that_launches_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"op/nothing/bfloat16: make\(\) launched no"):
        compile_case(case("nothing", lambda: None), "sm_80")


def test_without_triton_the_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    kernels = Path(sys.modules["simmim_kernels"].__file__).parents[1]
    path = os.pathsep.join([str(tmp_path), str(kernels)])
    done = subprocess.run(
        [sys.executable, "-m", "simmim_kernels.report"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "the report needs Triton: no triton here (`pip install triton`, Linux)"
    )
