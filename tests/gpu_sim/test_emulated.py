"""The compiled PTX of every op, emulated, against the reference: values, gradients, mutations."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gpu_sim.emulation import emulate
from pairwise import pairwise
from simmim_kernels.linear_masked_l1_loss import reference as linear_reference
from simmim_kernels.linear_masked_l1_loss import triton_kernel as linear
from simmim_kernels.masked_l1_loss import reference as loss_reference
from simmim_kernels.masked_l1_loss import triton_kernel as loss
from simmim_kernels.masked_l1_loss.arguments import Target
from simmim_kernels.merge_patches import reference as merge_reference
from simmim_kernels.merge_patches import triton_kernel as merge
from simmim_kernels.merge_patches.arguments import MergeParameters
from simmim_kernels.random_branch_scales import reference as scales_reference
from simmim_kernels.random_branch_scales import triton_kernel as random_scales
from simmim_kernels.random_patch_mask import reference as mask_reference
from simmim_kernels.random_patch_mask import triton_kernel as random_mask
from simmim_kernels.report.ahead_of_time import Launch
from simmim_kernels.substitute_mask_tokens import reference as substitute_reference
from simmim_kernels.substitute_mask_tokens import triton_kernel as substitute
from simmim_kernels.transformer_block import reference as block_reference
from simmim_kernels.transformer_block import triton_kernel as block
from simmim_kernels.transformer_block import triton_norms, triton_rows
from simmim_kernels.transformer_block.arguments import MlpParameters
from simmim_kernels.window_attention import reference as attention_reference
from simmim_kernels.window_attention import triton_kernel as attention
from simmim_kernels.window_attention.arguments import Windows

TARGETS = ["sm_80", "sm_90"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Either target lowers float32 to the same multiply-adds and barriers, and float16 as bfloat16.
TARGETS_AND_DTYPES = [
    *((target, torch.bfloat16) for target in TARGETS),
    ("sm_80", torch.float32),
    ("sm_90", torch.float16),
    pytest.param("sm_90", torch.float32, marks=pytest.mark.slow),
    pytest.param("sm_80", torch.float16, marks=pytest.mark.slow),
]
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def gradients(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(t.detach().double().requires_grad_() for t in leaves)
    out = function(*leaves)
    out.backward(grad.double())
    return [out.detach(), *(t.grad for t in leaves)]


def assert_as_exact_as(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Relative error of a few roundings to `dtype` (float32 sums get a little more)."""
    for got, exact in zip(found, expected, strict=True):
        assert got.isfinite().all()
        error = (got.double() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error <= max(2 * torch.finfo(dtype).eps, 2e-6), float(error)


def check_mask(grid: tuple[int, int], unit: int) -> None:
    ids, epochs = torch.tensor([3, -7, 2**41]), torch.tensor([1, 2**40, 0])
    key, units = 0x1234_5678_9ABC_DEF0, grid[0] * grid[1]
    arguments = (ids, epochs, key, *grid, unit, -(-units * 6 // 10))
    expected = mask_reference.random_patch_mask(*arguments)
    assert torch.equal(random_mask.forward(*arguments), expected)


def check_scales(batch: int) -> None:
    ids, epochs = torch.arange(batch) * 2**33 - 7, torch.arange(batch) % 3
    arguments = (ids, epochs, 0x1234_5678_9ABC_DEF0, int(0.37 * 2**53), 1 / 0.63, 3)
    expected = scales_reference.random_branch_scales(*arguments)
    assert torch.equal(random_scales.forward(*arguments), expected)


def check_substitute(dtype: torch.dtype, shape: tuple[int, int, int], position: bool) -> None:
    B, L, D = shape
    tokens, grad = torch.randn(B, L, D).to(dtype), torch.randn(B, L, D).to(dtype)
    token, mask = torch.randn(D).to(dtype), torch.rand(B, L) < 0.6
    tokens[mask] = float("nan")
    positions = torch.randn(L, D).to(dtype) if position else None

    def exact(tokens: Tensor, token: Tensor) -> Tensor:
        return substitute_reference.substitute_mask_tokens(tokens, mask, token, positions)

    out = substitute.forward(tokens, mask, token, positions)
    found = [out, *substitute.backward(grad, mask)]
    assert_as_exact_as(found, gradients(exact, grad, tokens, token), dtype)


def check_loss(dtype: torch.dtype, stride: int, grid: tuple[int, int], target: str) -> None:
    B, h, w = 1, 2, 2
    side = stride or 16
    image = torch.randn(B, 3, h * side, w * side)
    mask = torch.rand(B, *grid) < 0.6
    mask[0, 0, 0] = True
    mean = std = None
    exact_image = image.double()
    if target == "bytes":
        image = (image * 50 + 120).clamp(0, 255).to(torch.uint8)
        mean, std = MEAN, STD
        exact_image = loss_reference.normalise_pixels(image.double(), mean.double(), std.double())
    shape = (B, h, w, 3 * stride**2) if stride else image.shape
    prediction = torch.randn(shape).to(dtype)

    def exact(prediction: Tensor) -> Tensor:
        shuffled = loss_reference.shuffle_pixels(prediction, stride) if stride else prediction
        # the reference rounds to float32 inside; its definition in float64 is one line
        rows, columns = image.shape[2] // grid[0], image.shape[3] // grid[1]
        hidden = mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2).unsqueeze(1)
        error = torch.where(hidden, shuffled - exact_image, 0.0).abs().sum()
        return error / (hidden.sum() + 1e-5) / 3

    target = Target(image, mask, mean, std, stride, 0)
    value, per_pixel, signs = loss.forward(prediction, target, True)
    grad = loss.backward(torch.tensor(0.5), per_pixel, signs, shape, dtype)
    expected = gradients(exact, torch.tensor(0.5), prediction)
    assert_as_exact_as([value, grad], expected, dtype)


def check_linear(dtype: torch.dtype, stride: int, grid: tuple[int, int], D: int = 40) -> None:
    B, h, w = 3, 2, 2
    outputs = 3 * stride**2
    features, weight = torch.randn(B, h, w, D).to(dtype), (torch.randn(outputs, D) / 6).to(dtype)
    bias, image = torch.randn(outputs).to(dtype), torch.randn(B, 3, h * stride, w * stride)
    mask = torch.rand(B, *grid) < 0.6
    mask[0, 0, 0] = True

    def exact(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_reference.linear_masked_l1_loss(
            features, weight, bias, image, mask, stride, None
        ).double()

    target = Target(image, mask, None, None, stride, 0)
    value, per_pixel, signs = linear.forward(features, weight, bias, target, True)
    grads = linear.backward(
        torch.tensor(0.5), per_pixel, signs, features, weight, mask, stride, True, True
    )
    expected = gradients(exact, torch.tensor(0.5), features, weight, bias)
    assert_as_exact_as([value, *grads], expected, dtype)


def check_mlp(dtype: torch.dtype, shape: tuple[int, int, int, int], scaled: bool) -> None:
    """The row passes of the block are emulated; the matrix products between them are torch's."""
    B, L, C, M = shape
    x, grad = (torch.randn(B, L, C) * 2 + 1).to(dtype), torch.randn(B, L, C).to(dtype)
    fc1, fc2 = (torch.randn(M, C) / C**0.5).to(dtype), (torch.randn(C, M) / M**0.5).to(dtype)
    leaves = [x, torch.rand(C) + 0.5, torch.randn(C), fc1, torch.randn(M), fc2, torch.randn(C)]
    branch_scale = torch.tensor([1.25, 0.0, 1.25])[:B] if scaled else None
    leaves += [torch.randn(C)] if scaled else []

    def parameters(*leaves: Tensor) -> MlpParameters:
        return MlpParameters(*leaves, *([] if scaled else [None]))

    def exact(x: Tensor, *leaves: Tensor) -> Tensor:
        return block_reference.residual_mlp(x, parameters(*leaves), branch_scale, 1e-5)

    given = x, parameters(*leaves[1:]), branch_scale
    out, *kept = block.residual_mlp_forward(*given, 1e-5)
    grads = block.residual_mlp_backward(grad, *given, *kept, True)[: len(leaves)]
    assert_as_exact_as([out, *grads], gradients(exact, grad, *leaves), dtype)


def check_norm(dtype: torch.dtype, T: int, C: int) -> None:
    x, grad, dy = (torch.randn(T, C).to(dtype) for _ in range(3))
    weight, bias, scale = torch.rand(C) + 0.5, torch.randn(C), torch.tensor([2.0])
    y, *statistics = triton_norms.layer_norm(x, weight, bias, 1e-5)
    dx, partial = triton_norms.layer_norm_backward(
        grad, y_again := dy.clone(), x, *statistics, weight, bias, scale, None, True
    )

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (C,), weight, bias)

    expected = gradients(exact, dy, x, weight, bias)
    expected[1] += grad
    assert torch.equal(y, y_again)
    found = [y, dx, *triton_rows.added(partial)]
    assert_as_exact_as(found, [*expected, 2 * grad.double().sum(0)], dtype)


def check_gelu(dtype: torch.dtype, T: int, M: int) -> None:
    hidden, bias, grad = torch.randn(T, M).to(dtype), torch.randn(M), torch.randn(T, M).to(dtype)

    def exact(hidden: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.gelu(hidden + bias)

    expected = gradients(exact, grad, hidden, bias)
    out, partial = triton_rows.gelu_backward(grad, hidden, bias, None, True)
    others = torch.randn(2, 130, 20)
    *sums, grad_bias = triton_rows.added(others, partial)
    assert_as_exact_as([out, grad, grad_bias], expected, dtype)
    torch.testing.assert_close(torch.stack(sums), others.sum(1))


def check_attention(
    dtype: torch.dtype,
    side: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    spread: float = 1.0,
    cosine: bool = False,
    table: bool = False,
) -> None:
    S, D = window[0] * window[1], 32
    qkv, grad = torch.randn(1, *side, 3 * D).to(dtype), torch.randn(1, *side, D).to(dtype)
    offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
    bias = torch.randn(offsets, 1) if table else torch.randn(1, S, S)
    bias = bias.to(dtype).float() * spread
    factors = [torch.tensor([5.0])] if cosine else []
    windows = Windows(1, window, shift, D**-0.5)

    def exact(qkv: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        if table:
            bias = attention_reference.relative_position_bias(bias, window)
        return attention_reference.window_attention(qkv, bias, *windows, *factors)

    out, log_sums = attention.forward(qkv, bias, windows, *factors)
    grads = attention.backward(grad, qkv, bias, out, log_sums, windows, True, *factors)
    found = [out, *grads] if cosine else [out, *grads[:2]]
    assert_as_exact_as(found, gradients(exact, grad, qkv, bias, *factors), dtype)


def check_merge(dtype: torch.dtype, shape: tuple[int, int, int, int], M: int = 20) -> None:
    """The passes that gather and scatter are emulated; the matrix products are torch's."""
    B, H, W, C = shape
    x, grad = (torch.randn(shape) * 2 + 1).to(dtype), torch.randn(B, H // 2, W // 2, M).to(dtype)
    weight = (torch.randn(M, 4 * C) / C**0.5).to(dtype)
    leaves = [x, torch.rand(4 * C) + 0.5, torch.randn(4 * C), weight]

    def exact(*leaves: Tensor) -> Tensor:
        return merge_reference.merge_patches(*leaves, 1e-5)

    given = x, MergeParameters(*leaves[1:])
    out, statistics = merge.forward(*given, 1e-5)
    grads = merge.backward(grad, *given, statistics, True)
    assert_as_exact_as([out, *grads], gradients(exact, grad, *leaves), dtype)
    (grad_x, *_) = merge.backward(grad, *given, statistics, False)
    assert torch.equal(grad_x, grads[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("grid", "unit"), [((6, 6), 1), ((3, 5), 2), ((12, 12), 1)])
def test_random_patch_mask(target: str, grid: tuple[int, int], unit: int) -> None:
    with emulate(target):
        check_mask(grid, unit)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("window", "dtype"), [((6, 6), torch.bfloat16), ((5, 4), torch.float32)])
def test_tables_of_positions(target: str, window: tuple[int, int], dtype: torch.dtype) -> None:
    """The bias of pairs, and sums over pairs in a fixed order."""
    with emulate(target):
        check_attention(dtype, (window[0], 2 * window[1]), window, (1, 2), table=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [5, 200])
def test_random_branch_scales(target: str, batch: int) -> None:
    with emulate(target):
        check_scales(batch)


@pytest.mark.parametrize(
    ("target", "dtype", "position", "shape"),
    pairwise(TARGETS, DTYPES, [False, True], [(2, 36, 128), (1, 7, 63)]),
    ids=str,
)
def test_substitute_mask_tokens(
    target: str, dtype: torch.dtype, position: bool, shape: tuple[int, int, int]
) -> None:
    with emulate(target):
        check_substitute(dtype, shape, position)


# side of a cell of the prediction in pixels, cells of the mask
LAYOUTS = {
    "tokens of 32": (32, (2, 2)),
    "tokens of 16, fine mask": (16, (8, 8)),
    "tokens of 7": (7, (2, 14)),
    "image": (0, (2, 2)),
}


@pytest.mark.parametrize(
    ("target", "dtype", "image", "layout"),
    pairwise(TARGETS, DTYPES, ["float", "bytes"], list(LAYOUTS)),
    ids=str,
)
def test_masked_l1_loss(target: str, dtype: torch.dtype, image: str, layout: str) -> None:
    with emulate(target):
        check_loss(dtype, *LAYOUTS[layout], image)


@pytest.mark.parametrize(("target", "dtype"), TARGETS_AND_DTYPES, ids=str)
def test_linear_masked_l1_loss(target: str, dtype: torch.dtype) -> None:
    with emulate(target) as done:
        check_linear(dtype, 8, (2, 2))
    products = [c.mma_flops for launch, c in done if "_finish" not in launch.kernel]
    # float32 products are exact, so they stay off the tensor cores
    assert all(flops > 0 for flops in products) == (dtype != torch.float32)


@pytest.mark.parametrize(
    ("target", "dtype", "shape"),
    pairwise(TARGETS, DTYPES, [(2, 9, 48, 80), (1, 7, 20, 36)]),
    ids=str,
)
def test_residual_mlp(target: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    with emulate(target):
        check_mlp(dtype, shape, scaled=shape[0] > 1)


@pytest.mark.parametrize(
    ("target", "C"),
    [
        ("sm_80", 264),
        ("sm_90", 2056),
        pytest.param("sm_80", 2056, marks=pytest.mark.slow),
        pytest.param("sm_90", 264, marks=pytest.mark.slow),
    ],
)
def test_rows_that_several_warps_share(target: str, C: int) -> None:
    with emulate(target):
        check_norm(torch.bfloat16, 2, C)


def assert_window_attention(
    target: str,
    dtype: torch.dtype,
    side: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
) -> None:
    with emulate(target) as done:
        check_attention(dtype, side, window, shift)
    products = [c.mma_flops for launch, c in done if launch.kernel != "_sum_rows"]
    assert len(products) == (3 if attention.is_tiled(window[0] * window[1], dtype) else 2)
    # float32 products are exact, so they stay off the tensor cores
    assert all(flops > 0 for flops in products) == (dtype != torch.float32)


@pytest.mark.parametrize(("target", "dtype"), TARGETS_AND_DTYPES, ids=str)
def test_window_attention(target: str, dtype: torch.dtype) -> None:
    assert_window_attention(target, dtype, (6, 12), (6, 6), (3, 3))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("side", "shift"), [(7, 0), (12, 6)])
def test_attention_in_one_window(target: str, side: int, shift: int) -> None:
    assert_window_attention(target, torch.bfloat16, (side, side), (side, side), (shift, shift))


@pytest.mark.parametrize(("target", "dtype"), TARGETS_AND_DTYPES, ids=str)
def test_window_attention_by_cosines(target: str, dtype: torch.dtype) -> None:
    with emulate(target):
        check_attention(dtype, (6, 12), (6, 6), (3, 3), cosine=True)


@pytest.mark.parametrize("target", TARGETS)
def test_attention_by_cosines_in_one_window(target: str) -> None:
    with emulate(target):
        check_attention(torch.bfloat16, (12, 12), (12, 12), (6, 6), cosine=True)


@pytest.mark.parametrize(("target", "dtype"), TARGETS_AND_DTYPES, ids=str)
def test_merge_patches(target: str, dtype: torch.dtype) -> None:
    with emulate(target):
        check_merge(dtype, (2, 4, 6, 10))


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("sm_80", (1, 6, 4, 48)),
        ("sm_90", (1, 2, 4, 264)),
        pytest.param("sm_80", (1, 2, 4, 264), marks=pytest.mark.slow),
        pytest.param("sm_90", (1, 6, 4, 48), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_merge_of_wide_patches(target: str, shape: tuple[int, int, int, int]) -> None:
    with emulate(target):
        check_merge(torch.bfloat16, shape)


@pytest.mark.parametrize(
    ("target", "seed"),
    [  # these kernels have the same barriers for either target: the targets share the schedules
        pytest.param(target, seed, marks=() if seed % 2 == i else pytest.mark.slow)
        for i, target in enumerate(TARGETS)
        for seed in range(8)
    ],
)
def test_every_warp_schedule_gives_the_same(target: str, seed: int) -> None:
    with emulate(target, seed=seed):
        check_norm(torch.bfloat16, 5, 24)
        check_merge(torch.bfloat16, (1, 4, 6, 24))
        check_mask((6, 6), 1)
        check_substitute(torch.bfloat16, (1, 36, 48), False)
        check_loss(torch.bfloat16, 16, (2, 2), "bytes")


@pytest.mark.parametrize("target", TARGETS)
def test_attention_under_every_warp_schedule(target: str) -> None:
    for seed in range(8):
        with emulate(target, seed=seed):
            check_attention(torch.bfloat16, (6, 6), (6, 6), (3, 3))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(8))
def test_linear_head_under_every_warp_schedule(target: str, seed: int) -> None:
    with emulate(target, seed=seed):
        check_linear(torch.bfloat16, 8, (4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(8))
def test_tiled_attention_under_every_warp_schedule(target: str, seed: int) -> None:
    with emulate(target, seed=seed):
        check_attention(torch.bfloat16, (9, 8), (9, 8), (4, 0))


def without(pattern: str, kernel: str, which: int = 0) -> Callable[[Launch, str], str]:
    """A mutation: one line that matches is taken out of the kernel."""

    def mutate(launch: Launch, ptx: str) -> str:
        if launch.kernel != kernel:
            return ptx
        lines = ptx.split("\n")
        found = [n for n, line in enumerate(lines) if re.search(pattern, line)]
        if len(found) <= which:
            raise LookupError(f"{launch.kernel} has no line to take out")
        return "\n".join(line for n, line in enumerate(lines) if n != found[which])

    return mutate


def replaced(pattern: str, text: str, kernel: str) -> Callable[[Launch, str], str]:
    """A mutation: every match in the kernel becomes `text`."""

    def mutate(launch: Launch, ptx: str) -> str:
        if launch.kernel != kernel:
            return ptx
        changed, count = re.subn(pattern, text, ptx)
        if not count:
            raise LookupError(f"{launch.kernel} has nothing to replace")
        return changed

    return mutate


def substitute_bf16() -> None:
    check_substitute(torch.bfloat16, (2, 37, 48), False)


def loss_bf16() -> None:
    check_loss(torch.bfloat16, 16, (2, 2), "bytes")


def linear_bf16() -> None:
    check_linear(torch.bfloat16, 8, (2, 2), D=144)


def norm_bf16() -> None:
    check_norm(torch.bfloat16, 5, 24)


def gelu_bf16() -> None:
    check_gelu(torch.bfloat16, 5, 24)


def merge_bf16() -> None:
    check_merge(torch.bfloat16, (2, 4, 6, 24))


def attention_bf16() -> None:
    check_attention(torch.bfloat16, (6, 6), (6, 6), (3, 3))


def steep_attention_bf16() -> None:
    """Scores far apart: only the largest of a row may be subtracted before the exponential."""
    check_attention(torch.bfloat16, (6, 6), (6, 6), (0, 0), spread=100.0)


LOAD, STORE = r"@%p\d+ (ld\.global)", r"@%p\d+ (st\.global)"
TRANSPOSED = r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans"
MUTATIONS = {
    "rows stored without a mask": (substitute_bf16, replaced(STORE, r"\1", "_substitute")),
    "hidden rows read": (substitute_bf16, replaced(LOAD, r"\1", "_substitute")),
    "visible pixels read": (loss_bf16, replaced(LOAD, r"\1", "_masked_l1")),
    "sum over the wrong lanes": (
        loss_bf16,
        replaced(r"(shfl\.sync\.bfly\.b32.*), 1, 31", r"\1, 2, 31", "_masked_l1"),
    ),
    "barrier in the sum": (loss_bf16, without(r"bar\.sync", "_finish")),
    "barrier in the backward": (substitute_bf16, without(r"bar\.sync", "_substitute_backward")),
    "barriers in the head": (
        linear_bf16,
        replaced(r"bar\.sync[^;]*;", "", "_linear_masked_l1"),
    ),
    "factor not transposed": (
        linear_bf16,
        replaced(TRANSPOSED, "ldmatrix.sync.aligned.m8n8.x4", "_grad_features"),
    ),
    "wait for a copy": (linear_bf16, without(r"cp\.async\.wait_group", "_linear_masked_l1")),
    "rows normalised over the wrong lanes": (
        norm_bf16,
        replaced(r"(shfl\.sync\.bfly\.b32.*), 1, 31", r"\1, 2, 31", "_layer_norm"),
    ),
    "normalised rows stored without a mask": (norm_bf16, replaced(STORE, r"\1", "_layer_norm")),
    "barrier in the sums of the norm": (norm_bf16, without(r"bar\.sync", "_layer_norm_backward")),
    "partial sums read without a mask": (norm_bf16, replaced(LOAD, r"\1", "_add_partials")),
    "barrier in the sum of the GELU": (gelu_bf16, without(r"bar\.sync", "_gelu_backward")),
    "pairs across a seam": (attention_bf16, replaced("0fC2C80000", "0f00000000", "_attend_window")),
    "keys beyond the window": (
        attention_bf16,
        replaced("0fFF800000", "0f00000000", "_attend_window"),
    ),
    "smallest score of a row": (
        steep_attention_bf16,
        replaced(r"max\.f32", "min.f32", "_attend_window"),
    ),
    "barriers in attention": (
        attention_bf16,
        replaced(r"bar\.sync[^;]*;", "", "_attend_window_backward"),
    ),
    "weights not transposed": (
        attention_bf16,
        replaced(TRANSPOSED, "ldmatrix.sync.aligned.m8n8.x4", "_attend_window_backward"),
    ),
    "neighbours of another row": (
        merge_bf16,
        replaced(r"div\.s32", "min.s32", "_merge_patches"),
    ),
    "merged rows stored without a mask": (merge_bf16, replaced(STORE, r"\1", "_merge_patches")),
    "barrier in the sums of merged rows": (
        merge_bf16,
        without(r"bar\.sync", "_merge_patches_backward"),
    ),
    "steps of a word swapped": (loss_bf16, replaced(r"(shl\.b32.*), 16;", r"\1, 8;", "_masked_l1")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_code_is_noticed(name: str) -> None:
    check, mutate = MUTATIONS[name]
    changed, noticed = 0, False

    def counted(launch: Launch, ptx: str) -> str:
        nonlocal changed
        mutated = mutate(launch, ptx)
        changed += mutated != ptx
        return mutated

    for seed in range(8):
        torch.manual_seed(seed)
        try:
            with emulate("sm_80", seed=seed, mutate=counted):
                check()
        except (AssertionError, MemoryError, RuntimeError):
            noticed = True
            break
    assert changed, "the kernel of this mutation was not launched"
    assert noticed, "nobody noticed"
