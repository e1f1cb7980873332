"""Random crops, as the paper draws them, with the pixels of Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.data.augment import Augmentation, augment, centre_view, crop_box, sample_key
from simmim.data.decode import decode
from simmim_kernels import native

AUGMENTATION = Augmentation((32, 48), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3)


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


@pytest.mark.parametrize("extension", ["native", "missing"])
def test_augmentation_is_crop_resize_flip(
    photos: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same box through Pillow by hand gives the same pixels; half of the views are flipped."""
    if extension == "missing":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip(str(native.missing_reason))
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
