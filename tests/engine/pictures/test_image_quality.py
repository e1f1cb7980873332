"""Image quality: as it is defined, and as others compute it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from simmim.pictures.image_quality import signal_to_noise, similarity_map, structural_similarity


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    """Images of 20 × 33 pixels and noisy versions; more than are computed at once."""
    first = torch.nn.functional.interpolate(torch.rand(18, 3, 5, 7), (20, 33), mode="bicubic")
    first = first.clamp(0, 1)
    noise = torch.linspace(0.01, 0.5, 18).view(-1, 1, 1, 1)
    return first, (first + noise * torch.randn_like(first)).clamp(0, 1)


def test_similarity_by_definition() -> None:
    """It is computed window by window, in NumPy, without a convolution."""
    x, y = torch.rand(2, 1, 2, 9, 8, dtype=torch.float64)
    padded = [np.pad(t[0].numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for t in (x, y)]
    offsets = np.arange(11) - 5.0
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    expected = np.zeros((2, 9, 8))
    for channel, row, column in np.ndindex(expected.shape):
        a, b = (image[channel, row : row + 11, column : column + 11] for image in padded)
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a = (weights * (a - mean_a) ** 2).sum()
        var_b = (weights * (b - mean_b) ** 2).sum()
        both = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        expected[channel, row, column] = luminance * (2 * both + 9e-4) / (var_a + var_b + 9e-4)
    np.testing.assert_allclose(similarity_map(x, y)[0].numpy(), expected, rtol=1e-9)
    assert float(structural_similarity(x, y)) == pytest.approx(expected.mean(), rel=1e-9)


def test_similarity_and_noise_of_scikit_image(pairs: tuple[Tensor, Tensor]) -> None:
    """scikit-image leaves out the pixels near the border."""
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pairs
    found = similarity_map(x, y)[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    for number in range(len(x)):
        a, b = (t[number].double().numpy() for t in (x, y))
        expected = metrics.structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert float(found[number]) == pytest.approx(expected, rel=1e-7)
        noise = metrics.peak_signal_noise_ratio(a, b, data_range=1.0)
        assert signal_to_noise(float(((a - b) ** 2).mean())) == pytest.approx(noise, rel=1e-9)


def test_similarity_and_noise_of_torchmetrics(pairs: tuple[Tensor, Tensor]) -> None:
    metrics = pytest.importorskip("torchmetrics.image", exc_type=ImportError)
    x, y = pairs
    ssim = metrics.StructuralSimilarityIndexMeasure(data_range=1.0)
    psnr = metrics.PeakSignalNoiseRatio(data_range=1.0)
    for part in (slice(0, 5), slice(5, 18)):
        ssim.update(y[part], x[part])
        psnr.update(y[part], x[part])
    assert float(structural_similarity(x, y).mean()) == pytest.approx(float(ssim.compute()), 1e-5)
    error = float((x.double() - y.double()).square().mean())
    assert signal_to_noise(error) == pytest.approx(float(psnr.compute()), 1e-5)


def test_equal_images() -> None:
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(structural_similarity(image, image), torch.ones(2).double())
    assert structural_similarity(image[:0], image[:0]).shape == (0,)
    assert signal_to_noise(0.0) == math.inf
    assert math.isnan(signal_to_noise(math.nan))


def test_images_smaller_than_the_window() -> None:
    small = torch.zeros(1, 3, 5, 40)
    with pytest.raises(ValueError, match="at least 6"):
        structural_similarity(small, small)
