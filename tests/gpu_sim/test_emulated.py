"""The compiled PTX of every op, emulated, against the reference: values, gradients, mutations."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gpu_sim.emulation import emulate
from simmim_kernels.ahead_of_time import Launch
from simmim_kernels.linear_masked_l1_loss import reference as linear_reference
from simmim_kernels.linear_masked_l1_loss import triton_kernel as linear
from simmim_kernels.masked_l1_loss import reference as loss_reference
from simmim_kernels.masked_l1_loss import triton_kernel as loss
from simmim_kernels.random_patch_mask import reference as mask_reference
from simmim_kernels.random_patch_mask import triton_kernel as random_mask
from simmim_kernels.substitute_mask_tokens import reference as substitute_reference
from simmim_kernels.substitute_mask_tokens import triton_kernel as substitute

TARGETS = ["sm_80", "sm_90"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
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

    value, per_pixel, signs = loss.forward(prediction, image, mask, mean, std, stride, 0, True)
    grad = loss.backward(per_pixel * 0.5, signs, shape, dtype)
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

    value, per_pixel, signs = linear.forward(
        features, weight, bias, image, mask, None, None, stride, 0, True
    )
    grads = linear.backward(per_pixel * 0.5, signs, features, weight, mask, stride, True, True)
    expected = gradients(exact, torch.tensor(0.5), features, weight, bias)
    assert_as_exact_as([value, *grads], expected, dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("grid", "unit"), [((6, 6), 1), ((3, 5), 2), ((12, 12), 1)])
def test_random_patch_mask(target: str, grid: tuple[int, int], unit: int) -> None:
    with emulate(target):
        check_mask(grid, unit)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [False, True], ids=["plain", "position"])
@pytest.mark.parametrize("shape", [(2, 36, 128), (1, 7, 63)], ids=str)
def test_substitute_mask_tokens(
    target: str, dtype: torch.dtype, position: bool, shape: tuple[int, int, int]
) -> None:
    with emulate(target):
        check_substitute(dtype, shape, position)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", ["float", "bytes"])
@pytest.mark.parametrize(
    ("stride", "grid"),
    [(32, (2, 2)), (16, (8, 8)), (7, (2, 14)), (0, (2, 2))],
    ids=["tokens of 32", "tokens of 16, fine mask", "tokens of 7", "image"],
)
def test_masked_l1_loss(
    target: str, dtype: torch.dtype, image: str, stride: int, grid: tuple[int, int]
) -> None:
    with emulate(target):
        check_loss(dtype, stride, grid, image)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_masked_l1_loss(target: str, dtype: torch.dtype) -> None:
    with emulate(target) as done:
        check_linear(dtype, 8, (2, 2))
    products = [c.mma_flops for launch, c in done if "_finish" not in launch.kernel]
    # float32 products are exact, so they stay off the tensor cores
    assert all(flops > 0 for flops in products) == (dtype != torch.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_every_warp_schedule_gives_the_same(target: str) -> None:
    for seed in range(8):
        with emulate(target, seed=seed):
            check_mask((6, 6), 1)
            check_substitute(torch.bfloat16, (1, 36, 48), False)
            check_loss(torch.bfloat16, 16, (2, 2), "bytes")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(8))
def test_linear_head_under_every_warp_schedule(target: str, seed: int) -> None:
    with emulate(target, seed=seed):
        check_linear(torch.bfloat16, 8, (4, 4))


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
    "steps of a word swapped": (loss_bf16, replaced(r"(shl\.b32.*), 16;", r"\1, 8;", "_masked_l1")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_code_is_noticed(name: str) -> None:
    check, mutate = MUTATIONS[name]
    changed, noticed = 0, 0

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
            noticed += 1
    assert changed, "the kernel of this mutation was not launched"
    assert noticed, "nobody noticed"
