"""Random crops, as the paper draws them, with the pixels of Pillow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.data import augment as augment_module
from simmim.data.augment import (
    ATTEMPTS,
    STREAM,
    Augmentation,
    augment,
    centre_box,
    centre_view,
    crop_box,
    is_flipped,
    resized,
    sample_key,
)
from simmim.data.decode import decode
from simmim_kernels import native
from simmim_kernels.crop_resize import Filter
from simmim_kernels.splitmix import fold

AUGMENTATION = Augmentation((32, 48), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3)

# of keys fold(0) and fold(1), in an image of 640×480: a paper's crop and one of other bounds
PINNED_BOXES = [(13, 6, 460, 472), (33, 221, 190, 169), (13, 1, 553, 439), (44, 12, 351, 140)]
PINNED_FLIPPED = [0, 10, 14, 19, 23, 28, 29, 33, 38]

EXTENSIONS = pytest.mark.parametrize("extension", ["native", "missing"])


def use_extension(extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension == "missing":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip(str(native.missing_reason))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_crop_boxes_follow_the_paper() -> None:
    shares, ratios, corners = [], [], set()
    for key in range(4000):
        left, top, w, h = crop_box(sample_key(0, 0, key), 200, 200, (0.67, 1.0), (3 / 4, 4 / 3))
        assert 0 <= left <= 200 - w
        assert 0 <= top <= 200 - h
        shares.append(w * h / 200**2)
        ratios.append(w / h)
        corners.add((left, top))
    assert 0.66 < min(shares) < 0.68
    assert 0.95 < max(shares) <= 1.0
    assert min(ratios) > 0.66
    assert max(ratios) < 1.51
    assert abs(np.mean(np.log(ratios))) < 0.01
    assert len(corners) > 500


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (300, 3), (64, 64)])
def test_crop_of_odd_images(size: tuple[int, int]) -> None:
    left, top, w, h = crop_box(7, *size, (0.67, 1.0), (3 / 4, 4 / 3))
    assert w >= 1
    assert h >= 1
    assert left + w <= size[0]
    assert top + h <= size[1]
    image = np.full((size[1], size[0], 3), (10, 20, 30), np.uint8)
    assert augment(image, 7, AUGMENTATION).shape == (32, 48, 3)
    assert centre_view(image, (32, 48)).shape == (32, 48, 3)


@EXTENSIONS
def test_augmentation_is_crop_resize_flip(
    photos: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same box through Pillow by hand gives the same pixels; half of the views are flipped."""
    use_extension(extension, monkeypatch)
    pixels = decode(min(photos.iterdir()).read_bytes(), 3)
    image = Image.fromarray(pixels)
    flipped = 0
    for sample in range(200):
        key = sample_key(5, 0, sample)
        left, top, w, h = crop_box(key, *image.size, (0.67, 1.0), (3 / 4, 4 / 3))
        crop = image.crop((left, top, left + w, top + h))
        # rows first, as Pillow itself does before release 13
        rows = crop.resize((48, h), Image.Resampling.BILINEAR)
        plain = np.asarray(rows.resize((48, 32), Image.Resampling.BILINEAR))
        view = augment(pixels, key, AUGMENTATION)
        if np.array_equal(view, plain[:, ::-1]):
            flipped += 1
        else:
            assert np.array_equal(view, plain)
    assert 70 < flipped < 130


def test_draws_follow_the_key_for_good() -> None:
    """Changing what a key gives would break resuming."""
    assert sample_key(3, 5, 7) == fold(STREAM, 3, 5, 7)
    boxes = [
        crop_box(fold(key), 640, 480, scale, ratio)
        for key in range(2)
        for scale, ratio in (((0.67, 1.0), (3 / 4, 4 / 3)), ((0.08, 0.3), (0.5, 3.0)))
    ]
    assert boxes == PINNED_BOXES
    assert [key for key in range(40) if is_flipped(fold(key), 0.25)] == PINNED_FLIPPED


def test_every_draw_has_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    counters: list[int] = []
    values = iter([0.5, 0.5] * (ATTEMPTS - 1) + [0.0, 0.5, 0.25, 0.75, 0.9])

    def uniform(key: int, counter: int) -> float:
        counters.append(counter)
        return next(values)

    monkeypatch.setattr(augment_module, "uniform", uniform)
    # a box of half the area of a strip is too high, save at the last attempt, which is tiny
    box = crop_box(0, 30, 1000, (0.003, 1.0), (1.0, 1.0))
    assert box == (int(0.25 * 22), int(0.75 * 992), 9, 9)
    assert not is_flipped(0, 0.5)
    assert len(set(counters)) == len(counters) == 2 * ATTEMPTS + 3


def test_every_place_of_a_crop_is_possible() -> None:
    keys = [fold(key) for key in range(64)]
    corners = {crop_box(key, 2, 2, (0.25, 0.25), (1.0, 1.0))[:2] for key in keys}
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((10, 100), (0, 43, 10, 13)),  # 13 = 10 / (3/4)
        ((100, 10), (43, 0, 13, 10)),  # 13 = 10 · 4/3
        ((1, 300), (0, 149, 1, 1)),
        ((20, 20), (0, 0, 20, 20)),
    ],
)
def test_where_no_attempt_fits_the_largest_central_box_does(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert crop_box(7, *size, (3.0, 3.0), (3 / 4, 4 / 3)) == box


def test_augmentation_draws_what_it_is_told() -> None:
    """A scale, an aspect and a size that are nobody's defaults."""
    image, size = noise(50, 80), (9, 14)
    for sample in range(20):
        key = sample_key(1, 2, sample)
        wanted = Augmentation(size, (0.1, 0.2), (1.9, 2.1), 0.0, 3)
        left, top, w, h = crop_box(key, 80, 50, (0.1, 0.2), (1.9, 2.1))
        assert 380 <= w * h <= 820
        assert 1.8 <= w / h <= 2.25
        plain = resized(image, (left, top, w, h), size)
        np.testing.assert_array_equal(augment(image, key, wanted), plain)
        mirrored = augment(image, key, replace(wanted, flip=1.0))
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_flips_have_their_probability() -> None:
    keys = [fold(key) for key in range(2000)]
    for probability in (0.0, 0.1, 0.8, 1.0):
        share = np.mean([is_flipped(key, probability) for key in keys])
        assert share == pytest.approx(probability, abs=4 * (probability / 2000) ** 0.5)


def test_seed_epoch_and_sample_give_other_crops() -> None:
    keys = {
        sample_key(seed, epoch, sample)
        for seed in range(4)
        for epoch in range(4)
        for sample in range(4)
    }
    assert len(keys) == 64


@pytest.mark.parametrize(
    ("width", "height", "size", "box"),
    [
        (100, 40, (20, 20), (30, 0, 40, 40)),
        (30, 100, (20, 40), (0, 42, 30, 15)),
        (60, 45, (3, 4), (0, 0, 60, 45)),
        (1, 90, (32, 48), (0, 44, 1, 1)),
    ],
)
def test_the_central_box_is_the_largest_of_its_aspect(
    width: int, height: int, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert centre_box(width, height, size) == box
    image = noise(height, width)
    np.testing.assert_array_equal(centre_view(image, size), resized(image, box, size))


@EXTENSIONS
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_a_box_is_resized_by_the_filter_asked_for(
    extension: str, filter: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_extension(extension, monkeypatch)
    image, resample = noise(40, 60, 1), Image.Resampling[filter.upper()]
    crop = Image.fromarray(image[5:35, 20:44, 0])
    expected = np.asarray(crop.resize((7, 30), resample).resize((7, 11), resample))[..., None]
    found = resized(image, (20, 5, 24, 30), (11, 7), filter=filter)
    np.testing.assert_array_equal(found, expected)
    assert found.flags.c_contiguous
    out = np.zeros((11, 7, 1), np.uint8)
    assert resized(image, (20, 5, 24, 30), (11, 7), flip=True, filter=filter, out=out) is out
    np.testing.assert_array_equal(out, expected[:, ::-1])
    assert augment(image, 3, Augmentation((11, 7), (0.5, 1), (1, 2), 1.0, 1), out) is out
