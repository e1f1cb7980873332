"""Views of labelled images: what timm is handed, draws that follow their key only, evaluation."""

import io
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from labelled_images import (
    BANDS,
    COLOUR,
    GREY,
    KINDS,
    MEAN,
    SMALL,
    STD,
    encoded,
    image_for,
    noise,
    normalised,
    peer,
    scaled_rows_first,
    seed_generators,
    states,
)
from simmim.config.finetune import AugmentConfig
from simmim.data.decode import UnreadableImage
from simmim.data.finetune_views import EvaluationView, Pixels, TrainingView
from simmim.data.mixing import draws_from
from simmim.data.open import open_source
from simmim.data.producer import InlineProducer, Producer, SourceSamples
from simmim.data.workers import WorkerPool
from stand_in_timm import RandomCrop, StandIns, posterised, rotated


def test_a_view_is_a_function_of_seed_epoch_and_sample(pixels: Pixels) -> None:
    data, view = image_for(pixels), TrainingView(pixels, seed=5)
    first = view(data, 2, 7)
    assert first.shape == view.shape == (len(pixels.mean), *pixels.size)
    assert np.isfinite(first).all()
    random.random(), np.random.rand(), torch.rand(1)
    for again in (view, TrainingView(pixels, seed=5), pickle.loads(pickle.dumps(view))):
        assert np.array_equal(again(data, 2, 7), first)
    others = [view(data, 3, 7), view(data, 2, 8), TrainingView(pixels, seed=6)(data, 2, 7)]
    assert not any(np.array_equal(first, other) for other in others)


def test_generators_are_left_as_they_were(pixels: Pixels) -> None:
    seed_generators(1)
    random.gauss(0, 1), np.random.randn()  # both keep half a pair
    before = states()
    view = TrainingView(pixels, seed=5)
    for epoch in range(3):
        view(image_for(pixels), epoch, 0)
    with pytest.raises(UnreadableImage):
        view(b"no image", 0, 0)
    assert states() == before


def test_generators_are_left_as_they_were_after_an_error() -> None:
    seed_generators(1)
    before = states()
    with pytest.raises(ZeroDivisionError), draws_from(2**64 - 1):
        random.seed(np.random.rand() + torch.rand(1).item() + 1 / 0)
    assert states() == before


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_makes_the_same_batches(tmp_path: Path, kind: str) -> None:
    if kind != "bands":
        peer("timm.data")
    pixels = KINDS[kind]
    channels = len(pixels.mean)
    suffix = ".png" if channels in (1, 3) else ".npy"
    for number in range(5):
        image = encoded(noise(50 + number, 70, channels))
        (tmp_path / f"{number}{suffix}").write_bytes(image if number != 3 else image[:40])
    samples = SourceSamples(open_source(str(tmp_path)), TrainingView(pixels, seed=5))
    # the broken one, 3, stands in another slot every time
    places = [[(epoch, (slot + epoch) % 5) for slot in range(5)] for epoch in range(5)]

    def made(producer: Producer) -> list[torch.Tensor]:
        images = []
        for epoch, filled in enumerate(producer.batches(places)):
            broken = (3 - epoch) % 5
            assert [slot for slot, reason in filled.problems if reason] == [broken]
            assert not filled.image[broken].any()
            images.append(filled.image.clone())
        return images

    images = made(InlineProducer(samples))
    assert not torch.equal(images[0], images[1])
    for workers in (1, 3):
        pool = WorkerPool(samples, 5, workers=workers, prefetch=2, timeout_s=60, report=pytest.fail)
        assert all(torch.equal(a, b) for a, b in zip(images, made(pool), strict=True))
    assert samples.name(3) == f"3{suffix}"


def test_other_channels_are_cropped_and_flipped() -> None:
    augment = AugmentConfig(crop_scale=(1, 1), crop_ratio=(5 / 3, 5 / 3), flip=1.0)
    view = TrainingView(BANDS, 0, augment)
    assert "5 channels" in view.note
    assert "\n" not in view.note
    image = noise(24, 40, 5)
    assert np.array_equal(view(encoded(image), 0, 0), normalised(image[:, ::-1], BANDS))
    larger = noise(48, 80, 5)
    wanted = np.stack(
        [
            np.asarray(scaled_rows_first(Image.fromarray(band), (40, 24)))
            for band in np.moveaxis(larger, -1, 0)
        ],
        axis=-1,
    )
    assert np.array_equal(view(encoded(larger), 0, 0), normalised(wanted[:, ::-1], BANDS))
    partial = TrainingView(BANDS, 0)
    seen = [partial(encoded(image), epoch, 0) for epoch in range(8)]
    assert len({views.tobytes() for views in seen}) == 8


def test_other_channels_are_shifted_where_views_are_small() -> None:
    small = Pixels((8, 8), (0.0,) * 2, (1.0,) * 2)
    image = noise(8, 8, 2)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    shifts = {
        normalised(padded[y : y + 8, x : x + 8][:, ::step], small).tobytes()
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    view = TrainingView(small, 0)
    seen = {view(encoded(image), epoch, 0).tobytes() for epoch in range(400)}
    assert seen <= shifts
    assert len(seen) > 100


@pytest.mark.parametrize(("height", "width"), [(70, 131), (131, 70), (64, 64), (20, 20), (74, 73)])
@pytest.mark.parametrize("pixels", [COLOUR, GREY], ids=["colour", "grey"])
def test_evaluation_views_in_pillows_words(pixels: Pixels, height: int, width: int) -> None:
    image = noise(height, width, len(pixels.mean))
    short = min(height, width)
    size = (int(73 * width / short), int(73 * height / short))  # int(256 / 224 * 64) = 73
    scaled = scaled_rows_first(Image.fromarray(image.squeeze()), size)
    left, top = round((size[0] - 64) / 2), round((size[1] - 64) / 2)
    wanted = np.asarray(scaled.crop((left, top, left + 64, top + 64)))
    wanted = wanted.reshape(64, 64, len(pixels.mean))
    assert np.array_equal(EvaluationView(pixels)(encoded(image)), normalised(wanted, pixels))


def test_evaluation_views_of_images_that_fit_are_the_images() -> None:
    for pixels in (SMALL, BANDS):
        h, w = pixels.size
        image = noise(h, w, len(pixels.mean))
        view = EvaluationView(pixels, margin=1)
        assert view.shape == (len(pixels.mean), h, w)
        out = np.full(view.shape, np.nan, dtype=view.dtype)
        view.fill(out, encoded(image), epoch=4, sample=2)
        assert np.array_equal(out, normalised(image, pixels))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 3000), (3000, 1), (2, 500), (40, 4000)])
@pytest.mark.parametrize("kind", ["colour", "small", "bands"])
def test_images_of_extreme_shapes(shape: tuple[int, int], kind: str) -> None:
    pixels = KINDS[kind]
    data = encoded(noise(*shape, len(pixels.mean)))
    for margin in (None, 1, 0):
        assert np.isfinite(EvaluationView(pixels, margin)(data)).all()
    if kind != "bands":
        peer("timm.data")
    view = TrainingView(pixels, 0)
    for epoch in range(20):
        assert np.isfinite(view(data, epoch, 0)).all()


def test_views_of_long_images_show_their_middle() -> None:
    image = noise(3, 4000)
    middle = image[:, 2000 - 24 : 2000 + 24]
    for margin in (None, 1):
        view = EvaluationView(COLOUR, margin)
        assert np.array_equal(view(encoded(image)), view(encoded(np.ascontiguousarray(middle))))


def test_unreadable_images(write_image: Callable[..., Path]) -> None:
    view = EvaluationView(Pixels((16, 16), MEAN, STD, max_pixels=1000))
    data = write_image("x.png", size=(40, 30)).read_bytes()
    with pytest.raises(UnreadableImage, match="pixels"):
        view(data)
    for broken in (b"", data[:50]):
        with pytest.raises(UnreadableImage):
            EvaluationView(COLOUR)(broken)


def test_values_of_sixteen_bits() -> None:
    file = io.BytesIO()
    np.save(file, np.full((16, 16, 2), 3000, dtype=np.uint16))
    pixels = Pixels((16, 16), (0.0, 0.5), (1.0, 0.5), value_range=(0.0, 3000.0))
    for view in (EvaluationView(pixels), lambda data: TrainingView(pixels, 0)(data, 0, 0)):
        assert view(file.getvalue())[:, 8, 8].tolist() == [1.0, 1.0]


def test_settings_without_meaning_are_refused() -> None:
    for margin in (0.5, -1):
        with pytest.raises(ValueError, match="margin"):
            EvaluationView(COLOUR, margin)
    with pytest.raises(ValueError, match="crop_scale"):
        TrainingView(COLOUR, 0, AugmentConfig(crop_scale=(0, 1)))
    with pytest.raises(ValueError, match="crop_ratio"):
        TrainingView(COLOUR, 0, AugmentConfig(crop_ratio=(2, 1)))


PLAIN = AugmentConfig(auto_augment="", color_jitter=0.0, erase=0.0, crop_ratio=(1.0, 1.0))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("pixels", [COLOUR, SMALL], ids=["crops", "shifts"])
def test_the_flip_probability_is_the_configured_one(pixels: Pixels, flip: float) -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, 32:] = 255  # bright at the right
    view = TrainingView(pixels, 0, replace(PLAIN, crop_scale=(0.9, 1.0), flip=flip))
    for epoch in range(12):
        left, right = np.split(view(encoded(image), epoch, 0).mean((0, 1)), 2)
        assert (left.mean() > right.mean()) == bool(flip)


def test_crops_without_timm_have_the_configured_scale() -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[:, None, None], (128, 128, 3))
    data = encoded(np.ascontiguousarray(ramp))
    for scale, rows in ((0.25, 64), (1.0, 128)):
        view = TrainingView(COLOUR, 0, replace(PLAIN, crop_scale=(scale, scale)))
        made = view(data, 0, 0)[0] * STD[0] * 255
        # the step from row to row of 64, in levels: the crop's rows over 64, at two levels each
        assert np.median(np.diff(made, axis=0)) == pytest.approx(2 * rows / 64, abs=0.1)


def test_crops_without_timm_have_the_configured_ratio() -> None:
    down, right = np.mgrid[0:128, 0:128] * 2
    image = np.stack([down, right, 0 * down], axis=-1).astype(np.uint8)
    augment = replace(PLAIN, crop_scale=(0.25, 0.25), crop_ratio=(4.0, 4.0), flip=0.0)
    made = TrainingView(COLOUR, 0, augment)(encoded(image), 0, 0)
    # 32 rows and 128 columns of the image, two levels each, in 64 of the view
    assert np.median(np.diff(made[0] * STD[0] * 255, axis=0)) == pytest.approx(1, abs=0.1)
    assert np.median(np.diff(made[1] * STD[1] * 255, axis=1)) == pytest.approx(4, abs=0.1)


def test_shifts_down_and_to_the_right_are_drawn_by_themselves() -> None:
    dot = np.zeros((32, 32, 3), dtype=np.uint8)
    dot[16, 16] = 255
    view = TrainingView(SMALL, 0, replace(PLAIN, flip=0.0))
    places = [np.unravel_index(view(encoded(dot), e, 0)[0].argmax(), (32, 32)) for e in range(200)]
    rows, columns = np.array(places).T - 16
    assert set(rows) == set(columns) == set(range(-4, 5))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.3


@pytest.mark.parametrize(("size", "margin", "seen"), [(64, None, 56), (32, None, 64), (64, 2, 32)])
def test_evaluation_shows_the_middle_by_its_margin(
    size: int, margin: float | None, seen: float
) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    view = EvaluationView(Pixels((size, size), (0.0,) * 3, (1.0,) * 3), margin)
    rows = view(encoded(np.ascontiguousarray(ramp)))[0].mean(1) * 255
    assert rows[-4] - rows[3] == pytest.approx(seen * (size - 7) / size, abs=1)
    assert rows.mean() == pytest.approx(31.5, abs=0.6)


def test_squeezed_views_are_bicubic() -> None:
    image = noise(40, 100)
    wanted = np.asarray(scaled_rows_first(Image.fromarray(image), (64, 64)))
    assert np.array_equal(EvaluationView(COLOUR, 0)(encoded(image)), normalised(wanted, COLOUR))


def test_training_views_are_limited_in_pixels_too() -> None:
    for view in (TrainingView(replace(COLOUR, max_pixels=100), 0, PLAIN),):
        with pytest.raises(UnreadableImage, match="more than the limit"):
            view(encoded(noise(11, 10)), 0, 0)
        view(encoded(noise(10, 10)), 0, 0)


DRAWN = AugmentConfig(
    crop_scale=(0.2, 0.9),
    crop_ratio=(0.6, 1.6),
    flip=0.3,
    auto_augment="rand-m5",
    color_jitter=0.7,
    erase=0.15,
    erase_mode="rand",
    erase_count=3,
)


def test_every_value_arrives_at_timms_transform(stand_ins: StandIns) -> None:
    TrainingView(Pixels((48, 80), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), 0, DRAWN)
    assert stand_ins.transforms[0].options == {
        "input_size": (48, 80),
        "is_training": True,
        "scale": (0.2, 0.9),
        "ratio": (0.6, 1.6),
        "hflip": 0.3,
        "color_jitter": 0.7,
        "auto_augment": "rand-m5",
        "interpolation": "bicubic",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "re_prob": 0.15,
        "re_mode": "rand",
        "re_count": 3,
    }


def test_the_published_recipe_is_the_default(stand_ins: StandIns) -> None:
    TrainingView(COLOUR, 0)
    options = stand_ins.transforms[0].options
    # microsoft/SimMIM: config.py; crop and flip are timm's own defaults there
    assert {key: options[key] for key in ("color_jitter", "auto_augment", "scale", "hflip")} == {
        "color_jitter": 0.4,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "scale": (0.08, 1.0),
        "hflip": 0.5,
    }
    assert {key: options[f"re_{key}"] for key in ("prob", "mode", "count")} == {
        "prob": 0.25,
        "mode": "pixel",
        "count": 1,
    }


@pytest.mark.parametrize(
    ("on", "kept"),
    [
        ({"auto_augment": "rand-m5"}, {"auto_augment": "rand-m5"}),
        ({"color_jitter": 0.7}, {"color_jitter": 0.7}),
        ({"erase": 0.15}, {"re_prob": 0.15}),
    ],
)
def test_one_augmentation_is_drawn_without_the_others(
    stand_ins: StandIns, on: dict, kept: dict
) -> None:
    off = {"auto_augment": "", "color_jitter": 0.0, "erase": 0.0}
    TrainingView(COLOUR, 0, AugmentConfig(**off | on))
    names = ("auto_augment", "color_jitter", "re_prob")
    options = stand_ins.transforms[0].options
    # None switches an augmentation of timm off
    assert {name: options[name] or None for name in names} == dict.fromkeys(names) | kept


def test_a_recipe_of_crop_and_flip_asks_for_no_timm(stand_ins: StandIns) -> None:
    TrainingView(COLOUR, 0, AugmentConfig(auto_augment="", color_jitter=0.0, erase=0.0))
    TrainingView(BANDS, 0)
    assert not stand_ins.transforms


@pytest.mark.parametrize("pixels", [COLOUR, GREY], ids=["colour", "grey"])
def test_timms_draws_follow_seed_epoch_and_sample(stand_ins: StandIns, pixels: Pixels) -> None:
    data, seen = image_for(pixels), set()
    for seed, epoch, sample in [(5, 2, 7), (6, 2, 7), (5, 3, 7), (5, 2, 8)]:
        made = TrainingView(pixels, seed)(data, epoch, sample)
        torch.rand(1)
        assert np.array_equal(made, TrainingView(pixels, seed)(data, epoch, sample))
        assert made.shape == (len(pixels.mean), 64, 64)
        seen.add(made.tobytes())
    assert len(seen) == 4


@pytest.mark.parametrize("side", [32, 33])
def test_views_of_at_most_32_pixels_are_shifted(stand_ins: StandIns, side: int) -> None:
    TrainingView(Pixels((side - 8, side), *(COLOUR.mean, COLOUR.std)), 0)
    crop = stand_ins.transforms[0].transforms[0]
    assert isinstance(crop, RandomCrop) == (side == 32)
    if isinstance(crop, RandomCrop):
        assert (crop.size, crop.padding) == ((24, 32), 4)


def test_small_views_are_cut_from_an_image_that_just_covers_them(stand_ins: StandIns) -> None:
    image = np.zeros((64, 128, 3), dtype=np.uint8)
    image[:, 32:] = 200  # the stand-in cuts at the left: 32 of 64 columns, 8 of them dark
    made = TrainingView(SMALL, 0)(encoded(image), 0, 0)
    columns = made[0].mean(0) - made.min()
    assert columns[:12].max() < 5
    assert columns[20:].min() > 195


def test_posterising_to_no_bits_is_black_and_nothing_else_is_changed(stand_ins: StandIns) -> None:
    TrainingView(COLOUR, 0)
    policy = stand_ins.transforms[0].transforms[1].policy[0][0]
    rotate, posterise = policy.ops
    assert rotate.aug_fn is rotated
    picture = Image.fromarray(noise(5, 7))
    assert not np.asarray(posterise.aug_fn(picture, 0)).any()
    for bits in (1, 4):
        assert posterise.aug_fn(picture, bits).tobytes() == posterised(picture, bits).tobytes()
