"""Every kind of image file becomes the pixels that Pillow reads; broken ones are named."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from simmim.data import decode as decode_module
from simmim.data.decode import MAX_CHANNELS, Header, UnreadableImage, decode, read_header
from simmim.data.open import open_source


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {}),
        ("grey.jpeg", "L", {}),
        ("cmyk.JPG", "CMYK", {}),
        ("deep/er/b.png", "RGB", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
        ("grey_alpha.png", "LA", {}),
        ("bilevel.png", "1", {}),
        ("c.webp", "RGB", {}),
        ("d.bmp", "RGB", {}),
        ("e.tiff", "RGB", {}),
        ("f.gif", "P", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_file(
    write_image: Callable[..., Path], name: str, mode: str, options: dict, channels: int
) -> None:
    path = write_image(name, mode, **options)
    source = open_source(str(path.parents[len(Path(name).parts) - 1]))
    assert list(source.names) == [name]
    image = decode(source.read(0), channels)
    assert image.shape == (70, 90, channels)
    assert image.dtype == np.uint8


def test_exif_rotation(write_image: Callable[..., Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    path = write_image("turned.jpg", exif=exif)
    assert decode(path.read_bytes(), 3).shape == (90, 70, 3)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("where", ["exif", "xmp", "both"])
def test_headers_and_pixels_are_pillows(
    write_image: Callable[..., Path], orientation: int, where: str
) -> None:
    """Every orientation, valid or not, told by EXIF, by XMP, or by both and differently."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    options = {}
    if where != "xmp":
        exif[0x0112] = orientation
    if where != "exif":
        told = orientation if where == "xmp" else 3
        options["xmp"] = f'<x:xmpmeta tiff:Orientation="{told}"></x:xmpmeta>'.encode()
    data = write_image("turned.jpg", size=(50, 30), exif=exif, **options).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(data, 3), expected)
    header = read_header(data)
    assert (header.width, header.height, header.channels, header.format) == (50, 30, 3, "JPEG")
    assert header.upright_size == expected.shape[1::-1]


def test_jpegs_of_every_kind_have_pillows_pixels(write_image: Callable[..., Path]) -> None:
    kinds: list[dict] = [
        {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
        {"quality": 30}, {"mode": "L"}, {"keep_rgb": True}, {"restart_marker_rows": 1},
    ]  # fmt: skip
    for kind in kinds:
        data = write_image("x.jpg", **kind).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB"))
        assert read_header(data).plain
        assert np.array_equal(decode(data, 3), expected), kind


def test_sixteen_bit_png_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = decode((tmp_path / "deep.png").read_bytes(), 3)
    assert pixels[0, 0, 0] == 0
    assert pixels[-1, -1, 0] == 255
    assert abs(int(pixels[32, 0, 0]) - 128) <= 1


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def tiff(values: np.ndarray, **options: object) -> bytes:
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_four_inks_are_three_colours() -> None:
    data = encoded(Image.merge("CMYK", Image.fromarray(noise(20, 30, 4)).split()), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
    assert read_header(data) == Header(30, 20, 3, "JPEG")
    for channels in (None, 3):
        np.testing.assert_array_equal(decode(data, channels), expected)


def test_alpha_is_kept_where_it_is_wanted() -> None:
    values = noise(5, 6, 4)
    data = encoded(Image.fromarray(values), "PNG")
    assert read_header(data) == Header(6, 5, 4, "PNG")
    np.testing.assert_array_equal(decode(data, None), values)
    np.testing.assert_array_equal(decode(data, 3), values[..., :3])
    grey = encoded(Image.fromarray(values[..., :2]), "PNG")
    assert read_header(grey).channels == 2
    np.testing.assert_array_equal(decode(grey, None), values[..., :2])
    np.testing.assert_array_equal(decode(grey, 4), values[..., [0, 0, 0, 1]])


def test_a_palette_has_the_channels_of_its_colours() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    opaque, clear = encoded(image, "PNG"), encoded(image, "PNG", transparency=1)
    colours = np.array([[10, 20, 30, 255], [40, 50, 60, 0], [70, 80, 90, 255]], np.uint8)
    expected = colours[np.array([[0, 1], [2, 1]])]
    assert read_header(opaque).channels == 3
    assert read_header(clear).channels == 4
    np.testing.assert_array_equal(decode(opaque, None), expected[..., :3])
    np.testing.assert_array_equal(decode(clear, None), expected)
    np.testing.assert_array_equal(decode(clear, 3), expected[..., :3])


def test_grey_jpegs_are_grey_on_their_own_and_three_equal_bands_as_colours() -> None:
    data = encoded(Image.fromarray(noise(16, 24)), "JPEG")
    grey = decode(data, None)
    assert grey.shape == (16, 24, 1)
    np.testing.assert_array_equal(decode(data, 3), np.repeat(grey, 3, axis=2))
    with pytest.raises(UnreadableImage, match="1 channels instead of 5"):
        decode(data, 5)


RAMP = np.array([[500, 1000, 1250], [1500, 2000, 65535]], np.uint16)
AS_BYTES = np.array([[0, 0, 64], [128, 255, 255]], np.uint8)  # of 1000 … 2000


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        npy(RAMP),
        npy(RAMP.astype(np.int32)),
        tiff(np.stack([RAMP] * 2, axis=-1), photometric="minisblack", planarconfig="contig"),
    ],
    ids=["png", "float-tiff", "npy", "int-npy", "bands"],
)
def test_a_value_range_says_which_values_are_black_and_white(data: bytes) -> None:
    pixels = decode(data, None, value_range=(1000, 2000))
    for band in np.moveaxis(pixels, -1, 0):
        np.testing.assert_array_equal(band, AS_BYTES)


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32])
def test_values_that_have_no_range_of_their_own_need_one(dtype: type) -> None:
    with pytest.raises(UnreadableImage, match=r"data\.value_range must say which two"):
        decode(npy(np.zeros((4, 5), dtype)), None)


def test_a_range_may_be_below_zero_and_nothing_stays_undefined() -> None:
    values = np.array([[-1.0, 0.0, 1.0], [np.nan, np.inf, -np.inf]], np.float32)
    found = decode(npy(values), 1, value_range=(-1.0, 1.0))[..., 0]
    np.testing.assert_array_equal(found, [[0, 128, 255], [0, 255, 0]])


def test_without_a_range_sixteen_bits_keep_their_upper_eight() -> None:
    values = noise(4, 6, dtype=np.uint16)
    expected = (values >> 8).astype(np.uint8)[..., None]
    png = encoded(Image.fromarray(values), "PNG")
    wide = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert read_header(png) == Header(6, 4, 1, "PNG")
    for data in (npy(values), png, wide):
        np.testing.assert_array_equal(decode(data, None), expected)
    np.testing.assert_array_equal(decode(npy(values > 9), 1)[..., 0], (values > 9) * 255)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_rows_of_pixels_in_either_order_of_memory(order: str) -> None:
    values = noise(6, 4, 5)
    data = npy(np.asarray(values, order=order))  # type: ignore[call-overload]
    assert read_header(data) == Header(4, 6, 5, "NPY")
    found = decode(data, 5)
    np.testing.assert_array_equal(found, values)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(
        decode(npy(np.asarray(values[..., 0], order=order)), 1), values[..., :1]
    )


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((5, 40, 60), None, (40, 60, 5)),  # the shorter end is the channels
        ((40, 60, 5), None, (40, 60, 5)),
        ((5, 40, 60), 5, (40, 60, 5)),
        ((5, 40, 5), 5, (5, 40, 5)),  # the last axis, where both ends fit
        ((60, 40, 5), 60, (40, 5, 60)),  # what is wanted goes first
        ((6, 7, 6), None, (6, 7, 6)),
    ],
)
def test_the_axis_of_the_channels_is_found(
    shape: tuple[int, ...], channels: int | None, expected: tuple[int, ...]
) -> None:
    values = noise(*shape)
    found = decode(npy(values), channels)
    assert found.shape == expected
    moved = shape != expected
    np.testing.assert_array_equal(found, np.moveaxis(values, 0, -1) if moved else values)


def test_a_long_first_axis_is_no_axis_of_channels() -> None:
    shape = (MAX_CHANNELS + 1, 1, MAX_CHANNELS + 2)
    assert decode(npy(np.zeros(shape, np.uint8)), None).shape == shape


@pytest.mark.parametrize("bits", [np.uint8, np.uint16])
def test_tiffs_of_many_bands(bits: type) -> None:
    values = noise(12, 16, 6, dtype=bits)
    expected = values if bits is np.uint8 else (values >> 8).astype(np.uint8)
    data = tiff(values, photometric="minisblack", planarconfig="contig")
    assert read_header(data) == Header(16, 12, 6, "TIFF")
    np.testing.assert_array_equal(decode(data, 6), expected)
    with pytest.raises(UnreadableImage, match="6 channels instead of 3"):
        decode(data, 3)
    # colours deeper than Pillow reads
    deep = tiff(noise(4, 6, 3, dtype=np.uint16), photometric="rgb")
    np.testing.assert_array_equal(decode(deep, 3), noise(4, 6, 3, dtype=np.uint16) >> 8)


def test_pages_are_channels_only_where_as_many_are_wanted() -> None:
    values = noise(5, 12, 16)
    data = tiff(values, photometric="minisblack")
    np.testing.assert_array_equal(decode(data, 5), np.moveaxis(values, 0, -1))
    np.testing.assert_array_equal(decode(data, 1), values[0][..., None])


def test_many_bands_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(noise(12, 16, 6), photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UnreadableImage, match=r"pip install 'simmim\[tiff\]'"):
        decode(data, 6)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (6, 4)), "JPEG"),
        encoded(Image.new("RGB", (6, 4)), "PNG"),
        npy(noise(4, 6, 3)),
        npy(noise(5, 4, 6)),
        tiff(noise(5, 4, 6), photometric="minisblack", planarconfig="separate"),
    ],
    ids=["jpeg", "png", "npy", "npy-channels-first", "bands"],
)
def test_every_format_keeps_the_limit_of_pixels(data: bytes) -> None:
    assert decode(data, None, max_pixels=24).shape[:2] == (4, 6)
    with pytest.raises(UnreadableImage, match=r"6×4 pixels, more than the limit of 23 \(data"):
        decode(data, None, max_pixels=23)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_turned_too(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    values, options = noise(4, 6, 3), {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(values), kind, exif=exif, **options)
    assert read_header(data) == Header(6, 4, 3, kind, orientation=8)
    assert read_header(data).upright_size == (4, 6)
    np.testing.assert_array_equal(decode(data, 3), np.rot90(values))


def test_sizes_are_swapped_by_the_orientations_that_turn() -> None:
    sizes = [Header(6, 4, 3, "JPEG", orientation).upright_size for orientation in range(1, 9)]
    assert sizes == [(6, 4)] * 4 + [(4, 6)] * 4


def test_plain_jpegs_are_not_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes ten times as long to read the header, and longer to decode."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(Image, "open", refuse)
    for mode, wanted in (("RGB", 3), ("RGB", 4), ("L", 1), ("L", 3), ("RGB", None)):
        data = encoded(Image.new(mode, (6, 4)), "JPEG")
        assert read_header(data) == Header(6, 4, len(mode), "JPEG", plain=True)
        assert decode(data, wanted).shape == (4, 6, wanted or 3)


def test_what_simplejpeg_refuses_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError

    data = encoded(Image.fromarray(noise(16, 24, 3)), "JPEG")
    expected = decode(data, 3)
    monkeypatch.setattr(decode_module.simplejpeg, "decode_jpeg", refuse)
    np.testing.assert_array_equal(decode(data, 3), expected)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "header"])
def test_broken_files_are_named(write_image: Callable[..., Path], damage: str) -> None:
    data = write_image("x.jpg", size=(200, 200)).read_bytes()
    broken = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "text": b"<html>not found</html>",
        "header": data[:20] + bytes(len(data) - 20),
    }[damage]
    reason = {"empty": "^the file is empty$", "text": "^no image of a known format$"}
    with pytest.raises(UnreadableImage, match=reason.get(damage, ".")):
        decode(broken, 3)
