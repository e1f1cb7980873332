"""Lanes, warps and control flow of the PTX emulator, and what it refuses."""

import re

import numpy as np
import pytest

from gpu_sim.ptx_emulator import Program, run
from gpu_sim.written_ptx import SEEDS, TEMPLATE, apply, assemble, run_ptx


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
