"""masked_l1_loss and its token form: the published formula, its gradient, what must not leak."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from numerics import assert_close_to, load_golden
from simmim_kernels import masked_l1_loss, masked_l1_loss_from_tokens, native
from simmim_kernels.masked_l1_loss.reference import normalise_target, shuffle_pixels

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def published(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    rows, columns = image.shape[2] // mask.shape[1], image.shape[3] // mask.shape[2]
    hidden = mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2).unsqueeze(1).to(image)
    error = torch.nn.functional.l1_loss(image, prediction, reduction="none")
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / image.shape[1]


def patches(image: Tensor, stride: int) -> Tensor:
    """The inverse of the shuffle: [B, C, H, W] → [B, h, w, C·s·s]."""
    return torch.nn.functional.pixel_unshuffle(image, stride).permute(0, 2, 3, 1).contiguous()


def loss_and_gradient(function: Callable[[Tensor], Tensor], prediction: Tensor) -> list[Tensor]:
    leaf = prediction.detach().clone().requires_grad_()
    loss = function(leaf)
    (loss * 3).backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("size", "patch"), [((32, 32), 4), ((24, 40), 8), ((7, 7), 1), ((8, 8), 8), ((63, 21), 21)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_published_formula(channels: int, size: tuple[int, int], patch: int, backend: str) -> None:
    shape = (3, channels, *size)
    prediction = torch.randn(shape, dtype=torch.float64)
    image = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(3, size[0] // patch, size[1] // patch) < 0.6
    ours, theirs = prediction.float().requires_grad_(), prediction.clone().requires_grad_()
    loss = masked_l1_loss(ours, image.float(), mask, patch, backend=backend)
    expected = published(theirs, image, mask)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-9)


# batch, cell grid, channels, stride, mask grid: whole cells, finer, coarser and skewed masks,
# strides that are no multiple of 16
TOKEN_SHAPES = [
    (2, (2, 3), 3, 32, (2, 3)),
    (2, (2, 2), 3, 16, (1, 2)),
    (1, (2, 2), 3, 32, (16, 16)),
    (2, (3, 2), 3, 8, (6, 4)),
    (3, (2, 2), 1, 7, (14, 2)),
    (1, (2, 2), 3, 14, (28, 4)),
    (2, (3, 3), 2, 4, (2, 4)),
    (2, (5, 4), 4, 1, (5, 2)),
]


# Every pair of shape, dtype and target occurs, not every three of them.
@pytest.mark.parametrize(
    ("shape", "dtype", "target"),
    [
        (shape, dtype, ("float", "bytes")[(i + j) % 2])
        for i, shape in enumerate(TOKEN_SHAPES)
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_from_tokens_against_float64(
    shape: tuple, dtype: torch.dtype, target: str, backend: str
) -> None:
    B, (h, w), C, stride, grid = shape
    mask = torch.rand(B, *grid) < 0.6
    mask[0, 0, 0] = True
    prediction = torch.randn(B, h, w, C * stride**2, dtype=torch.float64).to(dtype)
    if target == "bytes":
        image = torch.randint(0, 256, (B, C, h * stride, w * stride), dtype=torch.uint8)
        constants = {"mean": (MEAN * 2)[:C], "std": (STD * 2)[:C]}
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in constants.values()
        )
        exact_image = (image.double() / 255 - mean) / std
    else:
        image, constants = torch.randn(B, C, h * stride, w * stride), {}
        exact_image = image.double()
    exact = loss_and_gradient(
        lambda p: published(shuffle_pixels(p, stride), exact_image, mask), prediction.double()
    )
    ours = loss_and_gradient(
        lambda p: masked_l1_loss_from_tokens(p, image, mask, stride, **constants, backend=backend),
        prediction,
    )
    plain = loss_and_gradient(
        lambda p: masked_l1_loss_from_tokens(
            p, image, mask, stride, **constants, backend="reference"
        ),
        prediction,
    )
    for got, expected, simple in zip(ours, exact, plain, strict=True):
        error = (got.double() - expected).abs().max()
        assert error <= 2 * (simple.double() - expected).abs().max() + 2.4e-7  # two ulps


def test_image_and_token_form_agree(backend: str) -> None:
    prediction, image = torch.randn(2, 3, 64, 32), torch.randn(2, 3, 64, 32)
    mask = torch.rand(2, 4, 2) < 0.6
    as_image = loss_and_gradient(
        lambda p: masked_l1_loss(p, image, mask, 16, backend=backend), prediction
    )
    as_tokens = loss_and_gradient(
        lambda p: masked_l1_loss_from_tokens(patches(p, 32), image, mask, 32, backend=backend),
        prediction,
    )
    for a, b in zip(as_image, as_tokens, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_same_pixels_on_a_coarser_grid_give_the_same_loss(backend: str) -> None:
    prediction, image = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    units = torch.rand(2, 2, 2) < 0.5
    fine = units.repeat_interleave(8, 1).repeat_interleave(8, 2)
    coarse_loss = loss_and_gradient(
        lambda p: masked_l1_loss(p, image, units, 32, backend=backend), prediction
    )
    fine_loss = loss_and_gradient(
        lambda p: masked_l1_loss(p, image, fine, 4, backend=backend), prediction
    )
    for a, b in zip(coarse_loss, fine_loss, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hidden", [False, True], ids=["none", "all"])
def test_nothing_or_everything_hidden(hidden: bool, backend: str) -> None:
    prediction, image = torch.randn(2, 3, 8, 24), torch.randn(2, 3, 8, 24)
    mask = torch.full((2, 2, 6), hidden)
    loss, gradient = loss_and_gradient(
        lambda p: masked_l1_loss(p, image, mask, 4, backend=backend), prediction
    )
    if hidden:
        torch.testing.assert_close(loss, (prediction - image).abs().mean())
    else:
        assert loss.item() == 0
        assert (gradient == 0).all()


def test_equal_pixels_have_no_gradient(backend: str) -> None:
    image = torch.randn(1, 3, 16, 16)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    loss, gradient = loss_and_gradient(
        lambda p: masked_l1_loss(p, image, mask, 8, backend=backend), image
    )
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_empty_batch(backend: str) -> None:
    prediction = torch.randn(0, 2, 2, 12)
    image, mask = torch.randn(0, 3, 4, 4), torch.ones(0, 2, 2, dtype=torch.bool)
    loss, gradient = loss_and_gradient(
        lambda p: masked_l1_loss_from_tokens(p, image, mask, 2, backend=backend), prediction
    )
    assert loss.item() == 0
    assert gradient.shape == prediction.shape


@pytest.mark.parametrize("norm_target", [None, 5])
def test_visible_non_finite_values_do_not_leak(norm_target: int | None, backend: str) -> None:
    mask = torch.tensor([[[True, False, False, False]]])
    visible = ~mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    visible = visible.expand(1, 3, 16, 64)
    prediction, image = torch.randn(1, 3, 16, 64), torch.randn(1, 3, 16, 64)
    prediction[visible] = float("nan")
    far = visible.clone()
    if norm_target is not None:  # the target mixes the neighbours within the window
        far[..., :20] = False
    expected = masked_l1_loss(
        torch.nan_to_num(prediction), image, mask, 16, norm_target=norm_target, backend="reference"
    )
    image[far] = float("inf")
    loss, gradient = loss_and_gradient(
        lambda p: masked_l1_loss(p, image, mask, 16, norm_target=norm_target, backend=backend),
        prediction,
    )
    torch.testing.assert_close(loss, expected)
    assert gradient.isfinite().all()
    assert (gradient[visible] == 0).all()
    assert (gradient[~visible] != 0).all()


def test_hidden_nan_reaches_the_loss(backend: str) -> None:
    """A predicted NaN must not go unseen; its gradient is 0, as that of torch's `abs` is."""
    prediction = torch.randn(1, 1, 4, 32)
    prediction[0, 0, 1, 5] = float("nan")
    mask = torch.ones(1, 1, 8, dtype=torch.bool)
    loss, gradient = loss_and_gradient(
        lambda p: masked_l1_loss(p, torch.zeros(1, 1, 4, 32), mask, 4, backend=backend), prediction
    )
    assert loss.isnan()
    assert gradient.isfinite().all()
    assert (gradient == 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_accumulates_in_float32(dtype: torch.dtype, backend: str) -> None:
    """65,536 hidden pixels with an error near 1 overflow or stall a sum in 16 bits."""
    prediction = (torch.ones(1, 1, 256, 256) + torch.rand(1, 1, 256, 256)).to(dtype)
    image = torch.zeros(1, 1, 256, 256)
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    exact = published(prediction.double(), image.double(), mask)
    found = masked_l1_loss(prediction, image, mask, 16, backend=backend)
    assert abs(found.item() - exact.item()) < 1e-5


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_strided_inputs(layout: str, backend: str) -> None:
    mask = torch.rand(2, 4, 4) < 0.6

    def strided(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(3)[..., ::2]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    prediction, image = torch.randn(2, 3, 16, 32), torch.randn(2, 3, 16, 32)
    mask = torch.rand(2, 4, 8) < 0.6
    expected = masked_l1_loss(prediction, image, mask, 4, backend="reference")
    found = masked_l1_loss(strided(prediction), strided(image), mask, 4, backend=backend)
    torch.testing.assert_close(found, expected)
    tokens = prediction.permute(0, 2, 3, 1)  # [2, 16, 32, 3]: cells of one pixel, not contiguous
    found = masked_l1_loss_from_tokens(tokens, strided(image), mask, 1, backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [3, 47])
@pytest.mark.parametrize("kind", ["float", "bytes"])
def test_normalised_target(window: int, kind: str, backend: str) -> None:
    """Both layouts on smooth images, against the definition in float64."""
    smooth = torch.nn.functional.interpolate(torch.randn(2, 3, 6, 5), (48, 32), mode="bilinear")
    image = (smooth * 60 + 120).clamp(0, 255).to(torch.uint8) if kind == "bytes" else smooth
    constants = {"mean": MEAN, "std": STD} if kind == "bytes" else {}
    exact = image.double()
    if kind == "bytes":
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        exact = (exact / 255 - mean) / std
    prediction, mask = torch.randn(2, 3, 48, 32), torch.rand(2, 3, 2) < 0.6
    expected = published(prediction.double(), normalise_target(exact, window), mask).float()
    options = {**constants, "norm_target": window, "backend": backend}
    found = masked_l1_loss(prediction, image, mask, 16, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    found = masked_l1_loss_from_tokens(patches(prediction, 16), image, mask, 16, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def test_no_gradient_wanted_keeps_no_signs(backend: str) -> None:
    prediction, image = torch.randn(1, 3, 16, 16, requires_grad=True), torch.randn(1, 3, 16, 16)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    with torch.no_grad():
        loss = masked_l1_loss(prediction, image, mask, 16, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, (prediction - image).abs().mean().detach())


@pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
def test_loss_ignores_the_thread_count() -> None:
    prediction, image = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)
    mask = torch.rand(4, 4, 4) < 0.6
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(masked_l1_loss(prediction, image, mask, 16, backend="native"))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_normalised_target_is_the_published_one() -> None:
    entry, tensors = load_golden("norm-target")
    images = next(v for k, v in tensors.items() if k.startswith("input/"))
    checked = 0
    for name, expected in tensors.items():
        if not name.startswith("expect/"):
            continue
        window = int("".join(c for c in name.rsplit("/", 1)[-1] if c.isdigit()))
        actual = normalise_target(images, window)
        for index in range(len(images)):
            tolerance = entry["tolerance"][f"image {index}"]
            assert_close_to(actual[index], expected[index], tolerance, f"{name} image {index}")
        checked += 1
    assert checked > 0
