"""crop_resize against Pillow, byte for byte, with every instruction set; edges of memory."""

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from simmim_kernels import crop_resize, native

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
Size = tuple[int, int]
FILTERS = ["bilinear", "bicubic", "lanczos"]
PROT_NONE = 0  # which the module mmap does not name
SIZES = [1, 7, 63, 100, 192, 224]
NEEDS_NATIVE = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))


@pytest.fixture(params=["reference", "native", "native-avx2", "native-baseline"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, target = request.param.partition("-")
    if name == "reference":
        yield name
        return
    if native.extension is None:
        pytest.skip(str(native.missing_reason))
    best = native.extension.target()
    if target and not native.extension.use_target(target):
        pytest.skip(f"this processor has no {target}")
    yield name
    native.extension.use_target(best)


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    """Bytes of all values, or 0 and 255 only, which is where sums reach furthest."""
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if rng.random() < 0.3 else image


def by_pillow(image: Pixels, box: Box, size: Size, filter: str, flip: bool = False) -> Pixels:
    """Channel by channel; rows first whatever the version, since each call resizes one axis."""
    left, top, width, height = box
    resample = Image.Resampling[filter.upper()]
    channels = []
    for c in range(image.shape[2]):
        view = Image.fromarray(np.ascontiguousarray(image[:, :, c]))
        view = view.crop((left, top, left + width, top + height))
        view = view.resize((size[1], height), resample).resize((size[1], size[0]), resample)
        channels.append(np.asarray(view))
    out = np.stack(channels, axis=2)
    return out[:, ::-1] if flip else out


def check(image: Pixels, box: Box, size: Size, filter: str, flip: bool, backend: str) -> None:
    out = np.full((size[0] + 2, size[1], image.shape[2]), 0x5A, dtype=np.uint8)
    found = crop_resize(image, box, size, flip=flip, filter=filter, out=out[1:-1], backend=backend)
    expected = by_pillow(image, box, size, filter, flip)
    assert np.array_equal(found, expected), (image.shape, box, size, filter, flip)
    assert (out[0] == 0x5A).all(), "wrote before its slot"
    assert (out[-1] == 0x5A).all(), "wrote past its slot"


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_every_size_of_box_and_result(backend: str, filter: str, channels: int) -> None:
    rng = np.random.default_rng([channels, *filter.encode()])
    image = noise(rng, (230, 225, channels))
    for height in SIZES:
        width, h, w = (int(v) for v in rng.choice(SIZES, 3))
        left, top = int(rng.integers(226 - width)), int(rng.integers(231 - height))
        check(image, (left, top, width, height), (h, w), filter, bool(height % 2), backend)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_photo_crops(backend: str, photos: Path, channels: int) -> None:
    for path in sorted(photos.iterdir())[:3]:
        with Image.open(path) as photo:
            image = np.array(photo.convert("RGB").convert({1: "L", 3: "RGB", 4: "CMYK"}[channels]))
        image = image.reshape(*image.shape[:2], channels)
        H, W, _ = image.shape
        for box in [(0, 0, W, H), (W // 9, H // 7, W * 2 // 3, H * 3 // 4)]:
            for size in [(192, 192), (224, 224)]:
                check(image, box, size, "bilinear", size[0] == 192, backend)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_pillow_in_one_call(backend: str, mode: str) -> None:
    # a case that Pillow resizes rows first in any version
    image = Image.fromarray(noise(np.random.default_rng(3), (400, 500, 3))).convert(mode)
    array = np.array(image).reshape(400, 500, -1)
    for filter in FILTERS:
        box, resample = (20, 30, 450, 340), Image.Resampling[filter.upper()]
        expected = np.array(image.crop((20, 30, 470, 370)).resize((192, 180), resample))
        found = crop_resize(array, box, (180, 192), filter=filter, backend=backend)
        assert np.array_equal(found, expected.reshape(180, 192, -1))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_boxes_at_the_borders(backend: str, channels: int, filter: str) -> None:
    image = noise(np.random.default_rng(channels), (41, 53, channels))
    for left, width in [(0, 53), (0, 1), (52, 1), (0, 20), (33, 20), (46, 7)]:
        for top, height in [(0, 41), (40, 1), (28, 13)]:
            check(image, (left, top, width, height), (19, 23), filter, top == 40, backend)


def test_random_cases(backend: str) -> None:
    rng = np.random.default_rng(20211118)
    for _ in range(150):
        channels = int(rng.choice([1, 2, 3, 3, 3, 4, 4, 7]))
        limit = 400 if rng.random() < 0.2 else 60
        H, W = (int(v) for v in rng.integers(1, limit, 2))
        image = noise(rng, (H, W, channels))
        width, height = int(rng.integers(1, W + 1)), int(rng.integers(1, H + 1))
        left, top = int(rng.integers(W - width + 1)), int(rng.integers(H - height + 1))
        h, w = (int(v) for v in rng.integers(1, 130, 2))
        h, w = (height if rng.random() < 0.15 else h), (width if rng.random() < 0.15 else w)
        filter, flip = FILTERS[rng.integers(3)], bool(rng.random() < 0.5)
        check(image, (left, top, width, height), (h, w), filter, flip, backend)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("taps", range(1, 20))
def test_every_number_of_taps(backend: str, taps: int, channels: int) -> None:
    image = noise(np.random.default_rng(taps), (2 * taps + 3, 9 * taps + 1, channels))
    height, width, _ = image.shape
    check(image, (0, 0, width, height), (4, 17), "bilinear", False, backend)
    check(image, (0, 0, width, height), (3, 9), "lanczos", True, backend)


def test_strong_reduction_of_extremes(backend: str) -> None:
    # thousands of taps, each of weight far below one unit of the high part
    image = noise(np.random.default_rng(5), (3000, 41, 3))
    image[:1500] = 255
    for filter in FILTERS:
        check(image, (0, 0, 41, 3000), (2, 5), filter, False, backend)
        turned = np.ascontiguousarray(image.swapaxes(0, 1))
        check(turned, (0, 0, 3000, 41), (5, 2), filter, True, backend)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_same_size_is_a_copy(backend: str, channels: int) -> None:
    image = noise(np.random.default_rng(2), (20, 31, channels))
    view = image[3:15, 4:30]
    for filter in FILTERS:
        found = crop_resize(image, (4, 3, 26, 12), (12, 26), filter=filter, backend=backend)
        assert np.array_equal(found, view)
        found = crop_resize(
            image, (4, 3, 26, 12), (12, 26), flip=True, filter=filter, backend=backend
        )
        assert np.array_equal(found, view[:, ::-1])


def test_rows_at_any_stride(backend: str) -> None:
    big = noise(np.random.default_rng(8), (60, 80, 3))
    for image in (big[5:50, 7:66], big[::3, 10:], big[::-1], big[40:10:-2, :50]):
        H, W, _ = image.shape
        check(image, (1, 2, W - 1, H - 2), (33, 21), "bilinear", True, backend)
        check(image, (0, 0, W, H), (33, 21), "bicubic", False, backend)


def test_one_column_and_one_channel_have_no_strides_to_ask_for(backend: str) -> None:
    big = noise(np.random.default_rng(9), (30, 40, 3))
    check(big[:, 7:8], (0, 3, 1, 20), (9, 8), "bilinear", False, backend)
    grey = np.ascontiguousarray(big[:, :, 1])[:, :, None]
    check(grey, (5, 3, 30, 20), (9, 8), "bilinear", False, backend)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_nothing_is_touched_beyond_the_image(backend: str, channels: int) -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    libc = ctypes.CDLL(None, use_errno=True)
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        start = ctypes.addressof(anchor)
        for guard in (0, 3):
            assert libc.mprotect(ctypes.c_void_p(start + guard * page), page, PROT_NONE) == 0
        middle = np.frombuffer(memory, dtype=np.uint8, count=2 * page, offset=page)
        rng = np.random.default_rng(channels)
        for H, W in [(1, 1), (1, 5), (2, 3), (5, 2), (9, 31), (24, 40)]:
            size = H * W * channels
            for place in (middle[-size:], middle[:size]):
                image = place.reshape(H, W, channels)
                image[:] = rng.integers(0, 256, image.shape)
                for view in (image, image[::-1]):
                    for filter, (h, w) in zip(FILTERS * 2, [(7, 9), (1, 1), (5, 64), (30, 2)] * 2):
                        check(view, (0, 0, W, H), (h, w), filter, h == 7, backend)
                        check(view, (W - 1, H - 1, 1, 1), (h, w), filter, False, backend)
            # and a result whose slot ends at the border
            out = middle[-11 * 13 * channels :].reshape(11, 13, channels)
            source = noise(rng, (H, W, channels))
            crop_resize(source, (0, 0, W, H), (11, 13), out=out, backend=backend)
            assert np.array_equal(out, by_pillow(source, (0, 0, W, H), (11, 13), "bilinear"))
    finally:
        for guard in (0, 3):
            libc.mprotect(
                ctypes.c_void_p(start + guard * page), page, mmap.PROT_READ | mmap.PROT_WRITE
            )


def test_result_is_the_slot_that_was_given(backend: str) -> None:
    batch = np.full((3, 16, 16, 3), 7, dtype=np.uint8)
    image = noise(np.random.default_rng(1), (20, 30, 3))
    found = crop_resize(image, (2, 3, 20, 15), (16, 16), out=batch[1], backend=backend)
    assert found.base is batch or np.shares_memory(found, batch[1])
    assert np.array_equal(batch[1], crop_resize(image, (2, 3, 20, 15), (16, 16), backend=backend))
    assert (batch[0] == 7).all()
    assert (batch[2] == 7).all()


IMAGE = np.zeros((10, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "box", "size", "options", "message"),
    [
        (IMAGE[0], (0, 0, 1, 1), (4, 4), {}, r"image \(12, 3\) uint8"),
        (IMAGE.astype(np.float32), (0, 0, 1, 1), (4, 4), {}, "float32 must be uint8"),
        (IMAGE, (0, 0, 13, 1), (4, 4), {}, r"width 13, .*within image \(10, 12, 3\)"),
        (IMAGE, (1, 0, 12, 1), (4, 4), {}, "left 1"),
        (IMAGE, (0, 3, 1, 8), (4, 4), {}, "top 3"),
        (IMAGE, (-1, 0, 1, 1), (4, 4), {}, "left -1"),
        (IMAGE, (0, 0, 0, 1), (4, 4), {}, "width 0"),
        (IMAGE, (0, 0, 1, -1), (4, 4), {}, "height -1"),
        (IMAGE[:, :, :0], (0, 0, 1, 1), (4, 4), {}, "hold pixels"),
        (IMAGE[:, ::2], (0, 0, 1, 1), (4, 4), {}, "contiguous pixels"),
        (IMAGE[:, :, :2], (0, 0, 1, 1), (4, 4), {}, "contiguous pixels"),
        (IMAGE, (0, 0, 1, 1), (0, 4), {}, "height 0"),
        (IMAGE, (0, 0, 1, 1), (4, -4), {}, "width -4"),
        (IMAGE, (0, 0, 1, 1), (4, 4), {"filter": "box"}, "known are bilinear"),
        (IMAGE, (0, 0, 1, 1), (4, 4), {"backend": "triton"}, "it has native, reference"),
        (IMAGE, (0, 0, 1, 1), (4, 4), {"out": IMAGE}, r"must be uint8 \(4, 4, 3\)"),
        (
            IMAGE,
            (0, 0, 1, 1),
            (4, 4),
            {"out": np.zeros((4, 4, 3), dtype=np.int8)},
            r"int8 must be uint8",
        ),
        (
            IMAGE,
            (0, 0, 1, 1),
            (4, 4),
            {"out": np.zeros((4, 8, 3), dtype=np.uint8)[:, ::2]},
            "C-contiguous",
        ),
    ],
)
def test_wrong_arguments(
    image: Pixels, box: Box, size: Size, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        crop_resize(image, box, size, **options)


def test_what_is_read_only_is_not_written() -> None:
    out = np.zeros((4, 4, 3), dtype=np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        crop_resize(IMAGE, (0, 0, 1, 1), (4, 4), out=out)
    read_only = IMAGE.copy()
    read_only.flags.writeable = False
    assert crop_resize(read_only, (0, 0, 5, 5), (4, 4)).shape == (4, 4, 3)


def test_fractions_of_pixels_are_refused() -> None:
    with pytest.raises(TypeError):
        crop_resize(IMAGE, (0.5, 0, 1, 1), (4, 4))  # type: ignore[arg-type]


def test_a_named_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = crop_resize(IMAGE, (0, 0, 5, 5), (4, 4), backend="reference")
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "missing_reason", "it was not built")
    with pytest.raises(RuntimeError, match="it was not built"):
        crop_resize(IMAGE, (0, 0, 5, 5), (4, 4), backend="native")
    assert np.array_equal(crop_resize(IMAGE, (0, 0, 5, 5), (4, 4)), expected)
