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


def array(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def jpeg(height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [2, 6])
def test_downscaling_is_pillows_lanczos(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 94, channels), dtype=np.uint8)
    made = decode(encode(array(pixels), Options(short_side=30)).data, channels)
    for channel in range(channels):
        wanted = Image.fromarray(pixels[:, :, channel]).resize((47, 30), Image.Resampling.LANCZOS)
        assert np.array_equal(made[:, :, channel], np.asarray(wanted))


@pytest.mark.parametrize(
    ("height", "width", "side", "size"),
    [(61, 90, 20, (20, 30)), (90, 59, 20, (31, 20)), (20, 33, 20, (20, 33)), (5, 9, 20, (5, 9))],
)
def test_the_shorter_side_is_scaled_and_never_enlarged(
    height: int, width: int, side: int, size: tuple[int, int]
) -> None:
    made = encode(array(np.zeros((height, width, 3), np.uint8)), Options(short_side=side))
    assert (made.height, made.width) == size == decode(made.data, 3).shape[:2]


@pytest.mark.parametrize(
    ("data", "channels", "keeps"),
    [
        (jpeg(20, 30), None, True),
        (jpeg(20, 30), 3, True),
        (jpeg(20, 30), 1, False),
        (jpeg(20, 30, "L"), 3, False),
        (jpeg(20, 30, "CMYK"), None, False),
        (jpeg(40, 50), None, False),
    ],
)
def test_which_jpegs_keep_their_bytes(data: bytes, channels: int | None, keeps: bool) -> None:
    made = encode(data, Options(short_side=32, channels=channels))
    assert (made.data == data) == keeps
    assert made.channels == (channels or 3) == decode(made.data, None).shape[2]
    kept = encode(data, Options(short_side=None, keep_originals=True, channels=channels))
    assert kept.data == data


def test_a_turned_jpeg_is_packed_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(20, 30, exif=exif)
    made = encode(data, Options())
    assert (made.height, made.width) == (30, 20)
    assert np.abs(decode(made.data, 3).astype(int) - decode(data, 3)).mean() < 10  # two losses
    with Image.open(io.BytesIO(made.data)) as image:
        assert image.size == (20, 30)
        assert 0x0112 not in image.getexif()


def test_values_take_their_range() -> None:
    deep = np.full((4, 5, 2), 500, dtype=np.uint16)
    made = encode(array(deep), Options(value_range=(0, 2000)))
    assert set(np.unique(decode(made.data, 2))) == {64}


def test_the_limit_is_of_all_pixels() -> None:
    data = jpeg(20, 30)
    assert encode(data, Options(max_pixels=600)).width == 30
    with pytest.raises(encoding.TooLarge, match=r"^30×20$"):
        encode(data, Options(max_pixels=599))
