"""The gate on what the Triton kernels compile to, and the bytes that the report says they move."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from gpu_sim.interpreter import interpret
from simmim_kernels import (
    masked_l1_loss,
    masked_l1_loss_from_tokens,
    merge_patches,
    random_patch_mask,
    substitute_mask_tokens,
)
from simmim_kernels.masked_l1_loss.triton_kernel import GROUPS_PER_PROGRAM
from simmim_kernels.report.ahead_of_time import TARGETS
from simmim_kernels.report.cases import attention_case as case_of_attention
from simmim_kernels.report.cases import (
    block_cases,
    cases,
    merge_case,
    post_norm_case,
)
from simmim_kernels.report.command import main
from simmim_kernels.report.golden import largest_bytes_ratio
from simmim_kernels.report.models import Attention, Block, Merge
from simmim_kernels.substitute_mask_tokens.triton_kernel import ROWS_PER_PROGRAM
from simmim_kernels.transformer_block import (
    post_norm_mlp,
    residual_attention,
    residual_mlp,
    triton_norms,
    triton_rows,
)
from simmim_kernels.window_attention import window_attention

GOLDEN = Path(__file__).parent / "report.json"
FIGURES = json.loads(GOLDEN.read_text())
SAME_TRITON = pytest.mark.skipif(
    triton.__version__ != FIGURES["triton"],
    reason=f"report.json is from triton {FIGURES['triton']}, this is {triton.__version__}",
)


def check_against_golden(
    models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    targets: Sequence[str] = tuple(TARGETS),
) -> None:
    chosen = [case for case in cases() if case.model in models]
    golden = dict(FIGURES)
    golden["cases"] = [
        c for c in FIGURES["cases"] if c["case"].split("/")[1] in models and c["target"] in targets
    ]
    assert len(golden["cases"]) == len(chosen) * len(targets)
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    arguments = ["--check", str(tmp_path / "golden.json"), "--target", *targets]
    status = main(arguments, known=chosen)
    assert status == 0, capsys.readouterr().err


@SAME_TRITON
def test_swin_base_compiles_to_the_golden_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    check_against_golden(["swin_base_192_w6"], tmp_path, capsys, ["sm_90"])


@SAME_TRITON
@pytest.mark.slow
def test_everything_compiles_to_the_golden_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    check_against_golden(sorted({case.model for case in cases()}), tmp_path, capsys)


def test_golden_figures_are_good() -> None:
    """Whoever regenerates the file cannot let these slip."""
    wide = {"_substitute", "_substitute_backward", "_masked_l1", "_masked_l1_backward"}
    wide |= {"_layer_norm", "_layer_norm_backward", "_gelu", "_gelu_backward", "_add_branch"}
    wide |= {"_merge_patches", "_merge_patches_backward"}
    seen = set()
    for case in FIGURES["cases"]:
        assert case["bytes_ratio"] <= largest_bytes_ratio(case["case"]), case["case"]
        for launch in case["launches"]:
            where = (case["case"], case["target"], launch["kernel"])
            assert launch["spill_bytes"] == 0, where
            assert launch["shared_bytes"] <= 99 << 10, where
            if launch["kernel"].startswith(("_linear", "_grad")):
                assert launch["tensor_ops"], where
            if launch["kernel"] in wide and case["target"] != "gfx942":
                seen.add(launch["kernel"])
                assert 16 in (launch["loads"]["narrowest"], launch["stores"]["narrowest"]), where
    assert seen == wide


def moved(launches: list) -> int:
    return sum(
        traffic.distinct_bytes
        for launch in launches
        for traffic in (launch.loaded, launch.stored, launch.atomic)
    )


def test_bytes_of_substitute_mask_tokens() -> None:
    B, L, D = 2, 96, 128
    tokens = torch.randn(B, L, D).bfloat16().requires_grad_()
    token = torch.randn(D).bfloat16().requires_grad_()
    mask = torch.rand(B, L) < 0.6
    with interpret() as counted:
        out = substitute_mask_tokens(tokens, mask, token, backend="triton")
        out.backward(torch.ones_like(out))
    partial = -(-B * L // ROWS_PER_PROGRAM) * D * 4
    visible = int((~mask).sum()) * D * 2
    expected = visible + 3 * B * L * D * 2 + 2 * B * L + 2 * D * 2 + 2 * partial
    assert moved(counted.launches) == expected


@pytest.mark.parametrize("stride", [0, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_masked_l1_loss(stride: int, dtype: torch.dtype) -> None:
    B, side = 2, 64
    image = torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8)
    mask = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [1, 0]]]).bool()
    shape = (B, 2, 2, 3 * 32 * 32) if stride else (B, 3, side, side)
    prediction = torch.randn(shape).to(dtype).requires_grad_()
    op = masked_l1_loss_from_tokens if stride else masked_l1_loss
    with interpret() as counted:
        options = {"mean": [0.5] * 3, "std": [0.25] * 3, "backend": "triton"}
        op(prediction, image, mask, 32, **options).backward()
    size, pixels = prediction.element_size(), image.numel()
    hidden = pixels // 2
    partials = -(-pixels // 16 // GROUPS_PER_PROGRAM) * 8
    # the last numbers: mask twice, mean and std, the scalars loss, per_pixel and step
    expected = hidden * (size + 1) + pixels * size + pixels // 16 * 8 + partials
    assert moved(counted.launches) == expected + 2 * mask.numel() + 24 + 12


def test_bytes_of_random_patch_mask() -> None:
    with interpret() as counted:
        random_patch_mask(5, (12, 12), unit=3, seed=0, backend="triton")
    assert moved(counted.launches) == 5 * (8 + 144) + 8  # ids and mask; the epoch


@pytest.mark.parametrize("scaled", [False, True])
def test_bytes_of_a_block(scaled: bool) -> None:
    B, L, C, M = 2, 35, 32, 80
    mlp_case, attention_case = block_cases(Block("small", B, L, C, M, scaled))
    scales = {"gamma": torch.ones(C), "branch_scale": torch.ones(B)} if scaled else {}
    options = {"backend": "triton"} | scales
    x = torch.randn(B, 5, 7, C).bfloat16().requires_grad_()
    norm = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    qkv, proj, fc1, fc2 = (
        torch.randn(n, m).bfloat16() for n, m in ((3 * C, C), (C, C), (M, C), (C, M))
    )
    qkv_bias, fc1_bias = torch.zeros(3 * C, requires_grad=True), torch.zeros(M)
    with interpret() as counted:
        out = residual_mlp(x, *norm, fc1, fc1_bias, fc2, norm[1], **options)
        out.backward(torch.ones_like(out))
    assert moved(counted.launches) == mlp_case.bytes_moved
    assert mlp_case.bytes_moved > mlp_case.bytes_needed
    options |= {"num_heads": 1, "window": (5, 7)}
    with interpret() as counted:
        out = residual_attention(x, *norm, qkv, qkv_bias, None, proj, norm[1], **options)
        out.backward(torch.ones_like(out))
    passes = (triton_norms, triton_rows)
    rows = [
        launch
        for launch in counted.launches
        if any(hasattr(module, launch.kernel) for module in passes)
    ]
    assert len(rows) < len(counted.launches)
    assert moved(rows) == attention_case.bytes_moved


@pytest.mark.parametrize(
    "attention",
    [
        Attention("one tile", 1, (6, 18), 2, 16, (6, 6), (3, 3)),
        Attention("unbiased", 2, (4, 4), 2, 16, (4, 4), biased=False),
        Attention("tiled", 1, (9, 16), 2, 16, (9, 8), (0, 4)),
        Attention("tiled, unbiased", 1, (1, 70), 1, 16, (1, 70), biased=False),
        Attention("cosine", 1, (6, 18), 2, 16, (6, 6), (3, 3), cosine=True),
        Attention("cosine, tiled", 1, (9, 16), 2, 16, (9, 8), (0, 4), cosine=True),
    ],
    ids=lambda attention: attention.model,
)
def test_bytes_of_window_attention(attention: Attention) -> None:
    N = attention.num_heads
    qkv = torch.randn(attention.batch, *attention.side, 3 * N * attention.head_width).bfloat16()
    offsets = math.prod(2 * side - 1 for side in attention.window)
    bias = torch.randn(offsets, N, requires_grad=True) if attention.biased else None
    places = (N, attention.window, attention.shift)
    options = {"logit_scale": torch.zeros(N) if attention.cosine else None, "backend": "triton"}
    with interpret() as counted:
        out = window_attention(qkv.requires_grad_(), bias, *places, **options)
        out.backward(torch.ones_like(out))
    copies, tokens = 0, attention.batch * math.prod(attention.side)
    if attention.cosine:  # torch's sum over queries
        copies += 4 * N * (tokens + 1)
    assert moved(counted.launches) + copies == case_of_attention(attention).bytes_moved


@pytest.mark.parametrize("scaled", [False, True])
def test_bytes_of_post_norm_mlp(scaled: bool) -> None:
    B, L, C, M = 2, 40, 48, 80
    shapes = ((B, L, C), (M, C), (M,), (C, M), (C,), (C,), (C,))
    leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    branch_scale = torch.rand(B) if scaled else None
    with interpret() as counted, torch.autocast("cpu", torch.bfloat16):
        out = post_norm_mlp(*leaves, branch_scale=branch_scale, backend="triton")
        out.backward(torch.ones_like(out))
    case = post_norm_case(Block("small", B, L, C, M, scaled))
    assert moved(counted.launches) == case.bytes_moved


def test_bytes_of_merge_patches() -> None:
    B, side, C, M = 2, 12, 48, 20
    x = torch.randn(B, side, side, C).bfloat16().requires_grad_()
    norm = torch.ones(4 * C, requires_grad=True), torch.zeros(4 * C, requires_grad=True)
    with interpret() as counted:
        out = merge_patches(x, *norm, torch.randn(M, 4 * C).bfloat16(), backend="triton")
        out.backward(torch.ones_like(out))
    case = merge_case(Merge("small", B, side, C))
    assert moved(counted.launches) == case.bytes_moved
