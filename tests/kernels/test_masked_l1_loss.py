"""masked_l1_loss: the published formula, its gradient, and what must not leak into it."""

import pytest
import torch
from torch import Tensor

from numerics import assert_close_to, load_golden
from simmim_kernels import masked_l1_loss
from simmim_kernels.masked_l1_loss.reference import normalise_target


def published(prediction: Tensor, image: Tensor, mask: Tensor, patch: int) -> Tensor:
    hidden = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1).to(image)
    error = torch.nn.functional.l1_loss(image, prediction, reduction="none")
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / image.shape[1]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("size", "patch"), [((32, 32), 4), ((24, 40), 8), ((7, 7), 1), ((8, 8), 8)]
)
def test_published_formula(channels: int, size: tuple[int, int], patch: int) -> None:
    shape = (3, channels, *size)
    prediction = torch.randn(shape, dtype=torch.float64)
    image = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(3, size[0] // patch, size[1] // patch) < 0.6
    ours, theirs = prediction.float().requires_grad_(), prediction.clone().requires_grad_()
    loss = masked_l1_loss(ours, image.float(), mask, patch)
    expected = published(theirs, image, mask, patch)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-9)


def test_same_pixels_on_a_coarser_grid_give_the_same_loss() -> None:
    prediction, image = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    units = torch.rand(2, 2, 2) < 0.5
    fine = units.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(
        masked_l1_loss(prediction, image, units, 32), masked_l1_loss(prediction, image, fine, 4)
    )


def test_nothing_hidden_is_zero() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = masked_l1_loss(x, torch.randn(2, 3, 8, 8), torch.zeros(2, 2, 2, dtype=torch.bool), 4)
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


def test_visible_non_finite_values_do_not_leak() -> None:
    mask = torch.tensor([[[True, False], [False, True]]])
    visible = ~mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand(1, 3, 8, 8)
    prediction, image = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    prediction[visible] = float("nan")
    image[visible] = float("inf")
    prediction.requires_grad_()
    loss = masked_l1_loss(prediction, image, mask, 4)
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad.isfinite().all()
    assert (prediction.grad[visible] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    """65,536 hidden pixels with an error near 1 overflow or stall a sum in 16 bits."""
    prediction = (torch.ones(1, 1, 256, 256) + torch.rand(1, 1, 256, 256)).to(dtype)
    image = torch.zeros(1, 1, 256, 256)
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    exact = published(prediction.double(), image.double(), mask, 16)
    assert abs(masked_l1_loss(prediction, image, mask, 16).item() - exact.item()) < 1e-5


def test_uint8_images_are_normalised() -> None:
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    scaled = (image.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    prediction, mask = torch.randn(2, 3, 8, 8), torch.rand(2, 2, 2) < 0.6
    loss = masked_l1_loss(prediction, image, mask, 4, mean=mean, std=std)
    expected = published(prediction.double(), scaled.double(), mask, 4)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_channels_last_prediction() -> None:
    prediction, image = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.rand(2, 2, 2) < 0.6
    strided = prediction.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        masked_l1_loss(strided, image, mask, 4), masked_l1_loss(prediction, image, mask, 4)
    )


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(1, 3, 8, 4)}, r"image \(1, 3, 8, 4\)"),
        ({"mask": torch.zeros(1, 2, 1, dtype=torch.bool)}, r"mask \(1, 2, 1\)"),
        ({"patch_size": 3}, "patch_size must divide"),
        ({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "uint8 with mean and std"),
        ({"norm_target": 4}, "must be odd"),
        ({"backend": "triton"}, "it has reference"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    arguments = {
        "prediction": torch.zeros(1, 3, 8, 8),
        "image": torch.zeros(1, 3, 8, 8),
        "mask": torch.zeros(1, 2, 2, dtype=torch.bool),
        "patch_size": 4,
    } | change
    with pytest.raises(ValueError, match=message):
        masked_l1_loss(**arguments)
