"""Which images of a run its pictures show."""

from collections.abc import Callable

import numpy as np
import pytest

from pictured import Squares, value_of
from simmim.config.sections import Config
from simmim.pictures.samples import pictured_images
from simmim_kernels.splitmix import fold, permutation

Configured = Callable[..., Config]


def test_the_seed_picks_the_images(configured: Configured, squares: Squares) -> None:
    for seed in (0, 3):
        images = list(pictured_images(squares, configured(seed=seed), 5, tries=20))
        # what a seed shows must not change between versions
        assert [image.sample for image in images] == permutation(fold(seed), 40)[:5].tolist()
        for image in images:
            assert image.data == squares.read(image.sample)
            wanted = np.full((16, 16, 3), value_of(image.sample))
            assert np.array_equal(image.centre, wanted)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_no_image_is_read_beyond_the_wanted(
    configured: Configured, squares: Squares, count: int
) -> None:
    assert len(list(pictured_images(squares, configured(), count, tries=40))) == count
    assert len(squares.tried) == count


def test_images_that_cannot_be_read_give_way_to_the_next(
    configured: Configured, squares: Squares
) -> None:
    order = permutation(fold(0), 40).tolist()
    squares.broken, squares.gone = {order[0], order[3]}, {order[1]}
    images = list(pictured_images(squares, configured(seed=0), 3, tries=40))
    assert [image.sample for image in images] == [order[2], order[4], order[5]]


def test_tries_are_bounded(configured: Configured, squares: Squares) -> None:
    squares.broken = set(range(40))
    assert not list(pictured_images(squares, configured(), 3, tries=7))
    assert len(squares.tried) == 7
