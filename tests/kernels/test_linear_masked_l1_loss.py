"""linear_masked_l1_loss: the head and the loss one after the other, by every backend."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from op_samples import head_inputs
from simmim_kernels import linear_masked_l1_loss, masked_l1_loss_from_tokens, native
from simmim_kernels.linear_masked_l1_loss.reference import hidden_cells

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# batch, cell grid, channels, stride, mask grid, width
SHAPES = [
    (3, (2, 2), 3, 16, (1, 2), 24),
    (2, (1, 2), 3, 32, (8, 16), 40),
    (2, (3, 2), 3, 8, (6, 4), 7),
    (2, (2, 2), 1, 7, (14, 2), 9),
    (1, (2, 3), 3, 14, (28, 6), 17),
    (40, (2, 2), 1, 4, (2, 2), 5),
]


def two_steps(
    features: Tensor, weight: Tensor, bias: Tensor | None, image: Tensor, mask: Tensor, stride: int
) -> Tensor:
    prediction = torch.nn.functional.linear(features, weight, bias)
    return masked_l1_loss_from_tokens(prediction, image, mask, stride, backend="reference")


def loss_and_gradients(function: Callable[..., Tensor], *leaves: Tensor | None) -> list[Tensor]:
    leaves = tuple(None if t is None else t.detach().clone().requires_grad_() for t in leaves)
    loss = function(*leaves)
    (loss * 3).backward()
    return [loss.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    features, weight, bias, image, mask, stride = head_inputs(shape, dtype).values()

    def ours(*leaves: Tensor) -> Tensor:
        return linear_masked_l1_loss(*leaves, image, mask, stride, backend=backend)

    def plain(*leaves: Tensor) -> Tensor:
        return two_steps(*leaves, image, mask, stride)

    exact = loss_and_gradients(
        lambda *leaves: two_steps(*leaves, image.double(), mask, stride),
        *(t.double() for t in (features, weight, bias)),
    )
    found = loss_and_gradients(ours, features, weight, bias)
    simple = loss_and_gradients(plain, features, weight, bias)
    for got, expected, torchs in zip(found, exact, simple, strict=True):
        assert got.dtype == torchs.dtype
        # norms: in 16 bits a rounded prediction can change the sign of a single pixel
        error = (got.double() - expected).norm()
        assert error <= 2 * (torchs.double() - expected).norm() + 1e-6 * expected.norm()


def test_bytes_without_bias_and_with_a_convolutions_weight(backend: str) -> None:
    features, weight, _, _, mask, stride = head_inputs(
        (2, (2, 2), 3, 16, (2, 2), 12), torch.float32
    ).values()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = loss_and_gradients(
        lambda f, w: two_steps(f, w, None, (image / 255 - mean) / std, mask, stride),
        features,
        weight,
    )
    found = loss_and_gradients(
        lambda f, w: linear_masked_l1_loss(
            f, w[:, :, None, None], None, image, mask, stride, mean=MEAN, std=STD, backend=backend
        ),
        features,
        weight,
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
def test_autocast_leaves_the_native_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are cast, but the products run in the dtype that the processor is fast in."""

    features, weight, bias, image, mask, stride = head_inputs(SHAPES[0], torch.float32).values()
    seen, product = [], torch.addmm

    def addmm(*arguments: Tensor) -> Tensor:
        seen.append(product(*arguments))
        return seen[-1]

    monkeypatch.setattr(torch, "addmm", addmm)
    with torch.autocast("cpu", torch.bfloat16):
        linear_masked_l1_loss(features, weight, bias, image, mask, stride, backend="native")
    assert [t.dtype for t in seen] == [native.product_dtype(torch.bfloat16)]


def test_normalised_target(backend: str) -> None:
    features, weight, bias, image, mask, stride = head_inputs(SHAPES[0], torch.float32).values()
    options = {"norm_target": 5, "backend": backend}
    prediction = torch.nn.functional.linear(features, weight, bias)
    expected = masked_l1_loss_from_tokens(
        prediction, image, mask, stride, norm_target=5, backend="reference"
    )
    found = linear_masked_l1_loss(features, weight, bias, image, mask, stride, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def test_cells_that_are_not_projected_may_hold_anything(backend: str) -> None:
    features, weight, bias, image, _, stride = head_inputs(
        (2, (2, 3), 3, 16, (2, 3), 8), torch.float32
    ).values()
    mask = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]).bool()
    features[~mask] = float("nan")
    image[~mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1).expand_as(image)] = (
        float("inf")
    )

    def loss(*leaves: Tensor) -> Tensor:
        return linear_masked_l1_loss(*leaves, image, mask, stride, backend=backend)

    if backend == "reference":
        # F.linear's weight gradient meets the NaN as 0 · NaN; the loss and other gradients do not
        found = loss_and_gradients(loss, features, weight, bias)
        assert found[0].isfinite()
        return
    found = loss_and_gradients(loss, features, weight, bias)
    assert all(t.isfinite().all() for t in found)
    assert (found[1][~mask] == 0).all()
    assert (found[1][mask] != 0).any(-1).all()


@pytest.mark.parametrize("case", ["nothing hidden", "no images"])
def test_degenerate(case: str, backend: str) -> None:
    features, weight, bias, image, mask, stride = head_inputs(SHAPES[0], torch.float32).values()
    if case == "nothing hidden":
        mask = torch.zeros_like(mask)
    else:
        features, image, mask = features[:0], image[:0], mask[:0]
    found = loss_and_gradients(
        lambda *leaves: linear_masked_l1_loss(*leaves, image, mask, stride, backend=backend),
        features,
        weight,
        bias,
    )
    assert all((t == 0).all() for t in found)
    assert found[1].shape == features.shape


def test_strided_features_and_image(backend: str) -> None:
    """An encoder's [B, D, h, w] in either memory format, and a channels-last image."""
    features, weight, bias, image, mask, stride = head_inputs(SHAPES[0], torch.float32).values()
    expected = two_steps(features, weight, bias, image, mask, stride)
    contiguous = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    last = image.to(memory_format=torch.channels_last)
    found = linear_masked_l1_loss(
        contiguous, weight.t().contiguous().t(), bias, last, mask, stride, backend=backend
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
def test_native_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from simmim_kernels.linear_masked_l1_loss import native_kernel

    features, weight, bias, image, mask, stride = head_inputs(
        (9, (2, 3), 3, 8, (8, 3), 6), torch.float32
    ).values()
    mask[4] = False  # an image without a hidden pixel

    def found() -> list[Tensor]:
        return loss_and_gradients(
            lambda *leaves: linear_masked_l1_loss(*leaves, image, mask, stride, backend="native"),
            features,
            weight,
            bias,
        )

    whole = found()
    for rows in (1, 7, 20):
        monkeypatch.setattr(native_kernel, "ROWS_AT_ONCE", rows)
        for a, b in zip(found(), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("cell", [1, 2, 3, 4, 6, 12])
def test_hidden_cells(stride: int, cell: int) -> None:
    mask = torch.rand(3, 24 // cell, 12 // cell) < 0.3
    pixels = mask.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    expected = pixels.unflatten(1, (24 // stride, stride)).unflatten(3, (12 // stride, stride))
    found = hidden_cells(mask, (24 // stride, 12 // stride), stride)
    assert torch.equal(found, expected.any(4).any(2))
