"""mma.sync, ldmatrix and stmatrix, against the fragment layouts of the PTX ISA."""

import numpy as np
import pytest

from gpu_sim.written_ptx import run_ptx, to_bits


@pytest.mark.parametrize("type_name", ["f16", "bf16", "tf32"])
def test_mma(type_name: str) -> None:
    rng = np.random.default_rng(0)
    K = 8 if type_name == "tf32" else 16
    A, B, C = (rng.integers(-8, 9, s).astype(np.float32) / 4 for s in ((16, K), (K, 8), (16, 8)))
    registers = np.zeros((10, 32), np.uint32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            registers[6 + i, lane] = C[group + 8 * (i // 2), 2 * thread + i % 2].view(np.uint32)
        if type_name == "tf32":
            # Bits below the 10th of the mantissa must not take part.
            a = [
                A[group + 8 * (i % 2), thread + 4 * (i // 2)].view(np.uint32) | 0x1FFF
                for i in range(4)
            ]
            b = [B[thread + 4 * i, group].view(np.uint32) | 0x1FFF for i in range(2)]
        else:
            half_a = [
                [A[group + 8 * (i % 2), 2 * thread + h + 8 * (i // 2)] for h in range(2)]
                for i in range(4)
            ]
            half_b = [[B[2 * thread + h + 8 * i, group] for h in range(2)] for i in range(2)]
            a, b = (to_bits(np.ravel(x), type_name).view(np.uint32) for x in (half_a, half_b))
        registers[:4, lane], registers[4:6, lane] = a, b
    names = [f"%r{i}" for i in range(10)]
    loads = "".join(f"ld.global.b32 {n}, [%rd1+{128 * i}];" for i, n in enumerate(names))
    a, b, c = (f"{{{', '.join(names[s])}}}" for s in (slice(4), slice(4, 6), slice(6, 10)))
    result = np.zeros((4, 32), np.float32)
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};" for i in range(4))
    body = (
        "mad.wide.u32 %rd1, %r99, 4, %rd60; mad.wide.u32 %rd2, %r99, 4, %rd61;"
        f"{loads} mma.sync.aligned.m16n8k{K}.row.col.f32.{type_name}.{type_name}.f32 "
        f"{{%r20, %r21, %r22, %r23}}, {a}, {b}, {c}; {stores}"
    )
    counters = run_ptx(body, registers, result)
    expected = A.astype(np.float64) @ B + C
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            assert result[i, lane] == expected[group + 8 * (i // 2), 2 * thread + i % 2]
    assert counters.mma_flops == 2 * 16 * 8 * K


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrix_loads_and_stores(count: int, transposed: bool) -> None:
    """ldmatrix hands lane 4r+c the row r of its matrix, columns 2c and 2c+1; stmatrix undoes it."""
    given = np.arange(count * 64, dtype=np.uint16)
    result = np.zeros((2, count * 64), np.uint16)
    bytes_ = 128 * count
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};" for i in range(count))
    # Thread t fills row t of the matrices, stacked; only the first 8 * count threads have one.
    body = f"""
    mov.u32 %r10, tile;
    rem.u32 %r9, %r99, {8 * count};
    mad.lo.s32 %r11, %r9, 16, %r10;
    mad.wide.u32 %rd1, %r9, 16, %rd60;
    mad.wide.u32 %rd2, %r99, 4, %rd61;
    mad.wide.u32 %rd3, %r9, 16, %rd61;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
    st.shared.v4.b32 [%r11], {{%r1, %r2, %r3, %r4}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
    {stores}
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r11+{bytes_}], {{{registers}}};
    bar.warp.sync -1;
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r11+{bytes_}];
    st.global.v4.b32 [%rd3+{bytes_}], {{%r1, %r2, %r3, %r4}};
    """
    tiles = f".shared .align 16 .b8 tile[{2 * bytes_}];"
    run_ptx(body, given, result, target="sm_90a", declarations=tiles)
    matrices = given.reshape(count, 8, 8)
    expected = matrices.transpose(0, 2, 1) if transposed else matrices
    assert (result[0].reshape(count, 8, 8) == expected).all()
    assert (result[1] == given).all()
