"""Images as they are packed."""

import io

import numpy as np
import pytest
from PIL import Image

from simmim.data.decode import UnreadableImage, decode
from simmim.packing import encode as encoding
from simmim.packing.encode import encode
from simmim.packing.options import Options


@pytest.mark.parametrize(
    ("channels", "extension"), [(1, "jpg"), (2, "png"), (3, "jpg"), (4, "png"), (6, "npy")]
)
def test_every_number_of_channels(channels: int, extension: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 47, channels), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, pixels)
    whole = encode(file.getvalue(), Options())
    assert (whole.extension, whole.width, whole.height, whole.channels) == (
        extension, 47, 30, channels,
    )  # fmt: skip
    if extension != "jpg":
        assert np.array_equal(decode(whole.data, None), pixels)
    smaller = encode(file.getvalue(), Options(short_side=15))
    assert decode(smaller.data, None).shape == (15, 24, channels)


def test_quality_and_sides_beyond_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, noise)
    sizes = [len(encode(file.getvalue(), Options(quality=q)).data) for q in (10, 50, 90)]
    assert sizes == sorted(set(sizes))
    with Image.open(io.BytesIO(encode(file.getvalue(), Options()).data)) as image:
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    long = io.BytesIO()
    np.save(long, np.zeros((1, 70_000, 3), dtype=np.uint8))
    assert encode(long.getvalue(), Options()).extension == "png"


def test_large_images_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "JPEG")
    monkeypatch.setattr(encoding, "decode", None)
    with pytest.raises(UnreadableImage, match="300×200"):
        encode(file.getvalue(), Options(max_pixels=50_000))
