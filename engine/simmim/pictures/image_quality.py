"""Measures how alike two sets of images are: signal-to-noise ratio and structural similarity.

B batch, C channels, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The published index: side and deviation of its Gaussian window, and what keeps quotients finite.
WINDOW, SIGMA = 11, 1.5
# Smallest side of an image, in pixels, that can be mirrored for the window.
SMALLEST = WINDOW // 2 + 1
_C1, _C2 = 0.01**2, 0.03**2

# Images that are compared at a time, as some ten float64 copies of them are held.
_CHUNK = 16


def signal_to_noise(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of values between 0 and 1; infinite if there is no error."""
    return math.inf if mean_squared_error == 0 else -10.0 * math.log10(mean_squared_error)


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity index of every pair of images, float64 [B]: means of `similarity_map`.

    Args:
        first: [B, C, H, W], values between 0 and 1, at least 6 × 6 pixels.
        second: of the same shape, with values between 0 and 1.

    Raises:
        ValueError: shapes differ, or images are smaller.

    Source: Wang et al. 2004, Image quality assessment: from error visibility to structural
        similarity.
    """
    if first.shape != second.shape or first.dim() != 4 or min(first.shape[2:]) < SMALLEST:
        raise ValueError(
            f"expected two [B, C, H, W] of at least {SMALLEST} × {SMALLEST} pixels, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    chunks = zip(torch.split(first, _CHUNK), torch.split(second, _CHUNK))
    return torch.cat([similarity_map(x, y).mean(dim=(1, 2, 3)) for x, y in chunks])


def similarity_map(first: Tensor, second: Tensor) -> Tensor:
    """The structural similarity index around every pixel, float64 [B, C, H, W].

    The window is Gaussian, of 11 × 11 pixels (σ 1.5), the constants are 0.01² and 0.03², and
    variances have no Bessel's correction. Images are mirrored at their border. The mean of the map
    is what torchmetrics' StructuralSimilarityIndexMeasure(data_range=1.0) gives. scikit-image
    (structural_similarity with gaussian_weights and without use_sample_covariance) leaves out the 5
    pixels at the border, as do old releases of torchmetrics (1.4.0).
    """
    # float64: variances are differences of near numbers, and a GPU's float32 convolutions round
    x, y = first.double(), second.double()
    mean_x, mean_y, xx, yy, xy = _windowed(torch.stack([x, y, x * x, y * y, x * y]))
    both = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    luminance = (2 * both + _C1) / (squares + _C1)
    structure = (2 * (xy - both) + _C2) / (xx + yy - squares + _C2)
    similarity: Tensor = luminance * structure
    return similarity


def _windowed(images: Tensor) -> Tensor:
    """Gaussian mean of the window around every pixel, [..., H, W]."""
    distance = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-distance.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    flat = F.pad(images.reshape(-1, 1, *images.shape[-2:]), [WINDOW // 2] * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(images.shape)
