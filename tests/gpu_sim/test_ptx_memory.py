"""Memory of the PTX emulator: moves, loads, stores, atomics and asynchronous copies."""

import numpy as np
import pytest

from gpu_sim.written_ptx import apply, run_ptx


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
