"""Every kind of image file becomes the pixels that Pillow reads; broken ones are named."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from simmim.data.decode import UnreadableImage, decode, read_header
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


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "header"])
def test_broken_files_are_named(write_image: Callable[..., Path], damage: str) -> None:
    data = write_image("x.jpg", size=(200, 200)).read_bytes()
    broken = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "text": b"<html>not found</html>",
        "header": data[:20] + bytes(len(data) - 20),
    }[damage]
    with pytest.raises(UnreadableImage):
        decode(broken, 3)
