"""Sums of pixels: of parts as of the whole, and exact."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simmim.packing.statistics import Statistics


@st.composite
def images(draw: st.DrawFn) -> list[np.ndarray]:
    """Grey and coloured images, or images of five bands."""
    kinds = draw(st.sampled_from([[1], [3], [1, 3], [5]]), label="channels")
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from(kinds)),
            min_size=1,
            max_size=6,
        )
    )
    bits = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = draw(st.integers(0, 255))
    return [bits.integers(low, 256, shape, dtype=np.uint8) for shape in shapes]


def sums_of(images: list[np.ndarray], skipped: int = 0) -> Statistics:
    sums = Statistics(skipped=skipped)
    for image in images:
        sums.add(image)
    return sums


@given(images=images(), cut=st.integers(0, 6), skipped=st.tuples(*[st.integers(0, 9)] * 2))
def test_parts_that_are_merged_are_the_whole(
    images: list[np.ndarray], cut: int, skipped: tuple[int, int]
) -> None:
    whole = sums_of(images, sum(skipped))
    merged = sums_of(images[:cut], skipped[0])
    merged.merge(sums_of(images[cut:], skipped[1]))
    assert merged == whole
    assert sum(whole.images.values()) == len(images)


@given(images=images())
def test_mean_and_deviation_are_those_of_all_pixels(images: list[np.ndarray]) -> None:
    channels = max(image.shape[2] for image in images)
    alike = [np.broadcast_to(image, (*image.shape[:2], channels)) for image in images]
    pixels = np.concatenate([image.reshape(-1, channels) for image in alike]) / 255
    mean, std = sums_of(images).mean_and_std()
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9, atol=1e-12)
