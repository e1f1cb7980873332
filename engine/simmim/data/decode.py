"""Encoded bytes → pixels: uint8 [H, W, C], upright, whatever the file's mode and depth.

JPEG goes through simplejpeg (libjpeg-turbo) and everything else through Pillow; both give the same
pixels for the same JPEG. Arrays of any number of channels come from .npy files and, with the extra
`tiff`, from multi-band TIFF.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Beyond this an image is refused before its pixels are decoded: 128 megapixels, 384 MiB as RGB.
MAX_PIXELS = 2**27

EXIF_ORIENTATION = 0x0112
JPEG_MAGIC = b"\xff\xd8"
JPEG_APP1, JPEG_SCAN = 0xFFE1, 0xFFDA
JPEG_FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
_SEGMENT = struct.Struct(">HH")  # marker, length
_FRAME = struct.Struct(">BHHB")  # bits, height, width, components
TIFF_SHORT = 3
XMP_MAGIC = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
TIFF_BITS_PER_SAMPLE, TIFF_SAMPLES_PER_PIXEL = 258, 277

# More than any sensor has; a larger first axis is rows, not channels.
MAX_CHANNELS = 4096

_JPEG_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}


class UnreadableImage(ValueError):
    """A file that is no complete image; the message says why."""


@dataclass(frozen=True)
class Header:
    """What an image says of itself before its pixels are decoded.

    Attributes:
        width: pixels, as stored.
        height: pixels, as stored.
        channels: as stored; palette and CMYK images count as they decode, 3 or 4.
        format: Pillow's name ("JPEG", "PNG", …), or "NPY".
        orientation: EXIF, 1 (upright) … 8; 5 to 8 swap width and height.
        plain: a JPEG of grey, YCbCr or RGB, as every decoder reads it.
    """

    width: int
    height: int
    channels: int
    format: str
    orientation: int = 1
    plain: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the decoded image."""
        size = self.width, self.height
        return size[::-1] if self.orientation >= 5 else size


def decode(
    data: bytes,
    channels: int | None,
    *,
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Decode an image of any mode: grey, palette, CMYK, 16 bits, N bands, with EXIF rotation.

    Args:
        data: an encoded image.
        channels: wanted number, or None for the file's own. 1 (grey), 3 (RGB) and 4 (RGBA) are
            made from one another; another number must be the file's.
        max_pixels: a larger image is refused before its pixels are decoded.
        value_range: the (low, high) that become 0 and 255 where values are not 8 bits; None takes
            the upper 8 of 16 bits and refuses other types.

    Returns:
        uint8 [H, W, C], C-contiguous.

    Raises:
        UnreadableImage: empty, truncated, too large, of other channels, or no image at all.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    with _unreadable_if_it_fails():
        pixels = _decode_jpeg(data, channels, max_pixels) if data[:2] == JPEG_MAGIC else None
        if pixels is None:
            pixels = _decode_other(data, channels, max_pixels, value_range)
    return pixels if pixels.flags.c_contiguous else np.ascontiguousarray(pixels)


def read_header(data: bytes) -> Header:
    """Size, channels and orientation of an encoded image, without decoding it.

    Raises:
        UnreadableImage: no image.
    """
    with _unreadable_if_it_fails():
        if data[:2] == JPEG_MAGIC:
            header = _jpeg_header(data)
            if header is not None:
                return header
        if data[:6] == NPY_MAGIC:
            (height, width, channels), _ = _as_rows(_npy_layout(data)[0], None)
            return Header(width, height, channels, "NPY")
        if data[:4] in TIFF_MAGICS and _has_bands_of_its_own(data):
            with _open_bands(data) as file:
                (height, width, channels), _ = _as_rows(file.series[0].shape, None)
            return Header(width, height, channels, "TIFF")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                # Pillow swaps the sides of a turned TIFF when it opens it
                tags: Any = getattr(image, "tag_v2", {})
                return Header(
                    tags.get(TIFF_WIDTH, width),
                    tags.get(TIFF_HEIGHT, height),
                    len(_natural_mode(image)),
                    str(image.format),
                    _orientation(image),
                )


@contextmanager
def _unreadable_if_it_fails() -> Iterator[None]:
    # decoders raise nearly anything on damaged data, at times without a word; the run must outlive
    # it, and an image without a reason would count as read
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("no image of a known format") from None
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def _jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG that simplejpeg decodes to grey or RGB; None for others.

    Walks over the segments up to the scan: Pillow takes ten times as long, which counts where
    small images are decoded by thousands a second. None also where anything is unusual.
    """
    at, size = 2, None
    orientation: int | None = None
    by_xmp = 1  # counts where EXIF says nothing, as in Pillow
    try:
        while True:
            marker, length = _SEGMENT.unpack_from(data, at)
            if marker == JPEG_SCAN:
                if size is None or size[2] not in (1, 3):
                    return None
                turned = by_xmp if orientation is None else orientation
                turned = turned if turned in range(1, 9) else 1
                return Header(*size, "JPEG", turned, plain=True)
            if marker in JPEG_FRAMES:
                bits, height, width, components = _FRAME.unpack_from(data, at + 4)
                if bits != 8 or not height or not width:
                    return None
                size = width, height, components
            elif marker == JPEG_APP1:
                if data.startswith(b"Exif\0\0", at + 4):
                    orientation = _exif_orientation(data, at + 10)
                elif data.startswith(XMP_MAGIC, at + 4):
                    match = _XMP_ORIENTATION.search(data, at, at + 2 + length)
                    by_xmp = int(match[1]) if match else 1
            elif marker < 0xFF00:
                return None
            at += 2 + length
    except struct.error:
        return None


def _exif_orientation(data: bytes, start: int) -> int | None:
    """The orientation in the TIFF structure at `start`, None where it has none."""
    order = "<" if data.startswith(b"II", start) else ">"
    entries = start + struct.unpack_from(f"{order}4xI", data, start)[0]
    (count,) = struct.unpack_from(f"{order}H", data, entries)
    for number in range(count):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, entries + 2 + 12 * number)
        if tag == EXIF_ORIENTATION:
            return value if kind == TIFF_SHORT else 1
    return None


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _decode_jpeg(data: bytes, channels: int | None, max_pixels: int) -> NDArray[np.uint8] | None:
    """Pixels of an upright JPEG; None leaves it to Pillow (CMYK, turned, damaged, to grey)."""
    header = _jpeg_header(data)
    if header is None or header.orientation != 1:
        return None
    channels = header.channels if channels is None else channels
    if channels not in _JPEG_COLOURS or channels < header.channels:
        return None
    _check_size(header.width, header.height, max_pixels)
    try:
        pixels = simplejpeg.decode_jpeg(data, _JPEG_COLOURS[channels])
    except ValueError:
        return None  # Pillow reads past what is harmless, and says what is not
    return cast(NDArray[np.uint8], pixels)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width}×{height} pixels, more than the limit of {max_pixels} (data.max_pixels)"
        )


def _decode_other(
    data: bytes,
    channels: int | None,
    max_pixels: int,
    value_range: tuple[float, float] | None,
) -> NDArray[np.uint8]:
    if data[:6] == NPY_MAGIC:
        return _fit(_read_npy(data, channels, max_pixels), channels, value_range)
    # pages of a stack are its channels only where that many are wanted
    stacked = channels is not None and channels not in MODES
    if data[:4] in TIFF_MAGICS and (stacked or _has_bands_of_its_own(data)):
        return _fit(_read_bands(data, channels, max_pixels), channels, value_range)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF blocks and big images
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255
        return _fit(_deep_values(upright)[:, :, None], channels, value_range)
    return _convert(upright, channels)


def _deep_values(image: Image.Image) -> NDArray[Any]:
    values = np.asarray(image)
    # 16-bit files whose values Pillow holds in 32 bits
    return np.clip(values, 0, 65535).astype(np.uint16) if image.mode == "I" else values


def _natural_mode(image: Image.Image) -> tuple[str, ...]:
    """The bands that an image keeps when nobody asks for a number of channels."""
    if image.mode == "P" and "transparency" in image.info:
        return ("R", "G", "B", "A")
    if image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV"):
        return ("R", "G", "B")
    return image.getbands()


def _convert(image: Image.Image, channels: int | None) -> NDArray[np.uint8]:
    natural = len(_natural_mode(image))
    if channels is None or channels == natural:
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[natural]
    elif channels in MODES:
        mode = MODES[channels]
    else:
        raise UnreadableImage(f"{natural} channels instead of {channels}")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _fit(
    values: NDArray[Any], channels: int | None, value_range: tuple[float, float] | None
) -> NDArray[np.uint8]:
    """[H, W, C] of any type → uint8 of the wanted number of channels."""
    pixels = _to_bytes(values, value_range)
    own = pixels.shape[2]
    if channels is None or own == channels:
        return pixels
    if channels not in MODES or own not in (1, 2, 3, 4):
        raise UnreadableImage(f"{own} channels instead of {channels}")
    squeezed = pixels[:, :, 0] if own == 1 else pixels
    return _convert(Image.fromarray(np.ascontiguousarray(squeezed)), channels)


def _to_bytes(values: NDArray[Any], value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return cast(NDArray[np.uint8], values)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise UnreadableImage(f"values of type {values.dtype} are no pixels")
    if value_range is None:
        if values.dtype == np.uint16:
            return (values >> 8).astype(np.uint8)
        raise UnreadableImage(
            f"values of type {values.dtype}: data.value_range must say which two become 0 and 255"
        )
    low, high = value_range
    scaled = (values.astype(np.float32) - low) * (255.0 / (high - low))
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
    pixels: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return pixels


def _npy_layout(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, Fortran order, type, offset of the values) of a .npy file."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise UnreadableImage(f"a .npy file of version {version}")
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise UnreadableImage("a .npy file of Python objects, which are never unpickled")
    return shape, fortran, dtype, file.tell()


def _as_rows(shape: tuple[int, ...], channels: int | None) -> tuple[tuple[int, int, int], bool]:
    """((H, W, C), whether channels come first) of an array's shape."""
    if len(shape) == 2:
        return (shape[0], shape[1], 1), False
    if len(shape) != 3 or min(shape) < 1:
        raise UnreadableImage(f"an array of shape {list(shape)} is no [H, W, C] or [C, H, W]")
    first, _, last = shape
    channels_first = last != channels and (
        first == channels if channels else first < last and first <= MAX_CHANNELS
    )
    H, W, C = (*shape[1:], first) if channels_first else shape
    return (H, W, C), channels_first


def _read_npy(data: bytes, channels: int | None, max_pixels: int) -> NDArray[Any]:
    shape, fortran, dtype, offset = _npy_layout(data)
    (height, width, _), channels_first = _as_rows(shape, channels)
    _check_size(width, height, max_pixels)
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - offset < needed:
        raise UnreadableImage(f"the file ends inside its values ({len(data)} bytes)")
    values = np.frombuffer(data, dtype, count=math.prod(shape), offset=offset)
    values = values.reshape(shape, order="F" if fortran else "C")
    if values.ndim == 2:
        return values[:, :, None]
    return np.moveaxis(values, 0, -1) if channels_first else values


def _has_bands_of_its_own(data: bytes) -> bool:
    """Whether a TIFF has more bands, or deeper ones, than Pillow reads."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bands, bits = tags.get(TIFF_SAMPLES_PER_PIXEL, 1), tags.get(TIFF_BITS_PER_SAMPLE, (8,))
            return bool(bands > 4 or (bands > 1 and max(bits) > 8))
    except (OSError, ValueError, SyntaxError):
        return True


def _open_bands(data: bytes) -> Any:
    try:
        import tifffile
    except ImportError:
        raise UnreadableImage(
            "a TIFF that Pillow cannot read: pip install 'simmim[tiff]' reads many bands"
        ) from None
    return tifffile.TiffFile(io.BytesIO(data))


def _read_bands(data: bytes, channels: int | None, max_pixels: int) -> NDArray[Any]:
    with _open_bands(data) as file:
        series = file.series[0]
        (height, width, _), channels_first = _as_rows(series.shape, channels)
        _check_size(width, height, max_pixels)
        values: NDArray[Any] = series.asarray()
    if values.ndim == 2:
        return values[:, :, None]
    return np.moveaxis(values, 0, -1) if channels_first else values
