"""Likeness of images: by definition, in both directions, and image by image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simmim.pictures.image_quality import signal_to_noise, similarity_map, structural_similarity


@st.composite
def pairs(draw: st.DrawFn, most: int = 3) -> tuple[Tensor, Tensor]:
    batch, channels = draw(st.integers(1, most)), draw(st.integers(1, 3))
    sides = draw(st.tuples(*[st.integers(6, 14)] * 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    shape = (2, batch, channels, *sides)
    first, second = torch.rand(shape, generator=generator, dtype=torch.float64)
    return first, first + (second - first) * draw(st.floats(0, 1))


@given(error=st.floats(1e-12, 1))
def test_signal_to_noise_is_the_peak_over_the_error(error: float) -> None:
    assert signal_to_noise(error) == pytest.approx(20 * math.log10(1 / math.sqrt(error)), abs=1e-9)
    assert signal_to_noise(error / 10) == pytest.approx(signal_to_noise(error) + 10)


@given(pair=pairs(), data=st.data())
def test_a_pixel_of_the_map_is_the_index_of_its_window(
    pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    first, second = pair
    at = tuple(data.draw(st.integers(0, side - 1)) for side in first.shape)
    padded = [
        np.pad(images[at[:2]].numpy(), 5, mode="reflect")[at[2] : at[2] + 11, at[3] : at[3] + 11]
        for images in pair
    ]
    distance = np.arange(-5, 6) ** 2
    weights = np.exp(-(distance[:, None] + distance[None]) / (2 * 1.5**2))
    weights /= weights.sum()
    x, y = ((weights * window).sum() for window in padded)
    var_x, var_y = ((weights * (w - m) ** 2).sum() for w, m in zip(padded, (x, y)))
    covariance = (weights * (padded[0] - x) * (padded[1] - y)).sum()
    expected = (2 * x * y + 1e-4) * (2 * covariance + 9e-4)
    expected /= (x * x + y * y + 1e-4) * (var_x + var_y + 9e-4)
    assert float(similarity_map(first, second)[at]) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=settings.default.max_examples // 5)
@given(pair=pairs(most=18))
def test_likeness_is_mutual_and_each_image_has_its_own(pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    likeness = structural_similarity(first, second)
    assert likeness.shape == (len(first),)
    torch.testing.assert_close(structural_similarity(second, first), likeness)
    alone = [structural_similarity(first[i : i + 1], second[i : i + 1]) for i in range(len(first))]
    torch.testing.assert_close(torch.cat(alone), likeness)
    assert (likeness <= 1 + 1e-9).all()
    torch.testing.assert_close(structural_similarity(first, first), torch.ones_like(likeness))
