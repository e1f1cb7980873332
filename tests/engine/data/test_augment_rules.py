"""Crops lie within the image and its bounds, whatever the image and the bounds are."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from simmim.data.augment import (
    Augmentation,
    augment,
    centre_box,
    crop_box,
    is_flipped,
    resized,
    sample_key,
)

KEYS = st.integers(0, 2**64 - 1)
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 5000))
SHARES = st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)).map(sorted).map(tuple)
RATIOS = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted).map(tuple)
Pair = tuple[float, float]


def _is_inside(box: tuple[int, int, int, int], width: int, height: int) -> bool:
    left, top, w, h = box
    return left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


@given(key=KEYS, width=SIDES, height=SIDES, scale=SHARES, ratio=RATIOS)
def test_a_crop_is_inside_the_image_and_as_large_and_as_wide_as_was_asked(
    key: int, width: int, height: int, scale: Pair, ratio: Pair
) -> None:
    box = crop_box(key, width, height, scale, ratio)
    left, top, w, h = box
    assert _is_inside(box, width, height)
    # sides are rounded to whole pixels
    slack = 0.5 + 1e-6
    share_fits = (
        (w + slack) * (h + slack) >= scale[0] * width * height
        and (w - slack) * (h - slack) <= scale[1] * width * height
    )  # fmt: skip
    middle = (left, top) == ((width - w) // 2, (height - h) // 2)
    assert share_fits or (middle and (w == width or h == height))
    if min(w, h) > 1:
        assert (w + slack) / (h - slack) >= ratio[0]
        assert (w - slack) / (h + slack) <= ratio[1]


@given(seed=st.integers(0, 2**32), side=st.integers(2, 5))
def test_crops_reach_every_place_and_every_draw_is_its_own(seed: int, side: int) -> None:
    # a quarter of the area, square: as many places along each side
    keys = [sample_key(seed, 0, sample) for sample in range(40 * side * side)]
    boxes = [crop_box(key, 2 * side, 2 * side, (0.25, 0.25), (1, 1)) for key in keys]
    reached = {(left, top) for left, top, _, _ in boxes}
    assert reached == {(left, top) for left in range(side + 1) for top in range(side + 1)}
    flipped = {(left, is_flipped(key, 0.5)) for key, (left, *_) in zip(keys, boxes)}
    assert len(flipped) == 2 * (side + 1)


@given(
    width=st.integers(1, 60), height=st.integers(1, 60), h=st.integers(1, 40), w=st.integers(1, 40)
)
def test_the_centre_is_the_largest_box_of_its_aspect(
    width: int, height: int, h: int, w: int
) -> None:
    left, top, box_w, box_h = centre_box(width, height, (h, w))
    assert _is_inside((left, top, box_w, box_h), width, height)
    assert box_w == width or box_h == height
    assert abs(2 * left + box_w - width) <= 1
    assert abs(2 * top + box_h - height) <= 1
    assert abs(box_w - box_h * w / h) <= 0.5 + 0.5 * w / h or 1 in (box_w, box_h)


@st.composite
def images(draw: st.DrawFn) -> np.ndarray:
    height, width, channels = draw(st.tuples(*[st.integers(2, 14)] * 2, st.integers(1, 5)))
    seed = draw(st.integers(0, 2**32))
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@given(
    image=images(), key=KEYS, scale=SHARES, ratio=RATIOS, size=st.tuples(*[st.integers(1, 9)] * 2)
)
def test_a_view_is_its_box_resized_and_mirrored_where_flipped(
    image: np.ndarray, key: int, scale: Pair, ratio: Pair, size: tuple[int, int]
) -> None:
    height, width, channels = image.shape
    plain, mirrored = (
        augment(image, key, Augmentation(size, scale, ratio, flip, channels)) for flip in (0.0, 1.0)
    )
    left, top, w, h = crop_box(key, width, height, scale, ratio)
    alone = np.ascontiguousarray(image[top : top + h, left : left + w])
    assert np.array_equal(plain, resized(alone, (0, 0, w, h), size))
    assert np.array_equal(mirrored, plain[:, ::-1])
    out = np.full((*size, channels), 7, dtype=np.uint8)
    assert augment(image, key, Augmentation(size, scale, ratio, 1.0, channels), out) is out
    assert np.array_equal(out, mirrored)


@given(image=images(), key=KEYS)
def test_the_whole_image_at_its_own_size_is_itself(image: np.ndarray, key: int) -> None:
    height, width, channels = image.shape
    assume(crop_box(key, width, height, (1, 1), (width / height,) * 2) == (0, 0, width, height))
    whole = Augmentation((height, width), (1, 1), (width / height,) * 2, 0.0, channels)
    assert np.array_equal(augment(image, key, whole), image)


@given(
    keys=st.tuples(*[st.tuples(*[st.integers(0, 2**40)] * 3)] * 2),
)
def test_seed_epoch_and_sample_all_count(keys: tuple[tuple[int, int, int], ...]) -> None:
    first, second = keys
    assert (sample_key(*first) == sample_key(*second)) == (first == second)
