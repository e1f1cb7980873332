"""Views of pre-training: crops that follow their key."""

import itertools
from pathlib import Path

import numpy as np

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.decode import decode
from simmim.data.open import open_source
from simmim.data.views import TwoViews

AUGMENTATION = Augmentation((48, 64), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, 3)


def test_views_are_keyed_crops_of_one_image(photos: Path) -> None:
    source = open_source(str(photos))
    view = TwoViews(AUGMENTATION, 4)
    out = np.empty(view.shape, np.uint8)
    data = source.read(3)
    view.fill(out, data, 6, 3)
    image = decode(data, 3)
    for number in range(2):
        expected = augment(image, sample_key(4, 12 + number, 3), AUGMENTATION)
        np.testing.assert_array_equal(out[number], expected)
    assert (out[0] != out[1]).any()
    again = np.empty_like(out)
    view.fill(again, data, 7, 3)
    assert all((a != b).any() for a, b in itertools.product(out, again))
