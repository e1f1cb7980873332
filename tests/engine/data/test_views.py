"""Views of pre-training: crops that follow their key."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest

from simmim.config.sections import Config, DataConfig
from simmim.data.augment import Augmentation, augment, centre_view, sample_key
from simmim.data.decode import UnreadableImage, decode
from simmim.data.open import open_source
from simmim.data.views import CentreView, CroppedView, RandomCrops, TwoViews, View, crops_of

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


def array(height: int, width: int, channels: int) -> tuple[bytes, np.ndarray]:
    """An encoded array of values from 0 to 4, and the bytes that they are by that range."""
    values = np.random.default_rng(0).integers(0, 5, (height, width, channels), dtype=np.int16)
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue(), np.rint(values * (255 / 4)).astype(np.uint8)


def test_a_single_crop_is_keyed_and_has_the_configured_range() -> None:
    data, pixels = array(20, 30, 5)
    augmentation = Augmentation((8, 6), (0.2, 0.4), (0.5, 0.6), 0.3, 5)
    view = CroppedView(augmentation, 7, value_range=(0.0, 4.0))
    assert view.shape == (8, 6, 5)
    out = np.empty(view.shape, np.uint8)
    for epoch, sample in ((0, 3), (9, 3), (9, 4)):
        view.fill(out, data, epoch, sample)
        expected = augment(pixels, sample_key(7, epoch, sample), augmentation)
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(view.decoded(data), pixels)


def test_a_central_view_has_the_configured_size_channels_and_range() -> None:
    data, pixels = array(20, 30, 5)
    wanted = DataConfig(image_size=(8, 6), channels=5, value_range=(0.0, 4.0))
    view = CentreView(Config(data=wanted))
    assert view.shape == (8, 6, 5)
    out = np.empty(view.shape, np.uint8)
    for epoch in range(2):
        view.fill(out, data, epoch, 3)
        np.testing.assert_array_equal(out, centre_view(pixels, (8, 6)))


@pytest.mark.parametrize("kind", [CroppedView, TwoViews, CentreView])
@pytest.mark.parametrize(("limit", "refused"), [(600, False), (599, True)])
def test_a_view_refuses_images_above_the_configured_pixels(
    kind: type, limit: int, refused: bool
) -> None:
    data, _ = array(20, 30, 3)
    augmentation, values = Augmentation((8, 6), (0.2, 0.4), (0.5, 0.6), 0.3, 3), (0.0, 4.0)
    view: View = (
        CentreView(Config(data=DataConfig(image_size=(8, 6), max_pixels=limit, value_range=values)))
        if kind is CentreView
        else kind(augmentation, 7, max_pixels=limit, value_range=values)
    )
    out = np.empty(view.shape, np.uint8)
    if refused:
        with pytest.raises(UnreadableImage, match="more than the limit of 599"):
            view.fill(out, data, 0, 0)
    else:
        view.fill(out, data, 0, 0)


def test_the_crops_of_a_view_have_keys_of_their_own() -> None:
    crops = RandomCrops(AUGMENTATION, 4, per_sample=3)
    assert [crops.epoch_of(epoch, number) for epoch in (0, 2) for number in range(3)] == [
        0, 1, 2, 6, 7, 8,
    ]  # fmt: skip
    assert crops.key(2, 1, 9) == sample_key(4, 7, 9)
    one = RandomCrops(AUGMENTATION, 4)
    assert one.key(2, 0, 9) == sample_key(4, 2, 9)


def test_what_a_view_says_of_its_crops() -> None:
    told = crops_of(TwoViews(AUGMENTATION, 4, max_pixels=9, value_range=(1.0, 2.0)))
    assert told == RandomCrops(AUGMENTATION, 4, 9, (1.0, 2.0), 2)
    assert crops_of(CroppedView(AUGMENTATION, 5)) == RandomCrops(AUGMENTATION, 5)

    class Other(CroppedView):
        def decoded(self, data: bytes) -> np.ndarray:
            return super().decoded(data)[::-1]

    assert crops_of(Other(AUGMENTATION, 5)) is None
