"""Views of labelled images: the published recipe to the bit, draws that follow their key only."""

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    peer,
    seed_generators,
    states,
)
from simmim.config.finetune import AugmentConfig
from simmim.data.decode import UnreadableImage, decode
from simmim.data.finetune_views import EvaluationView, Pixels, TrainingView
from simmim.data.mixing import draws_from
from simmim.data.open import open_source
from simmim.data.producer import InlineProducer, Producer, SourceSamples
from simmim.data.workers import WorkerPool

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@pytest.fixture
def transforms() -> Any:
    return peer("torchvision.transforms")


@pytest.fixture(scope="module")
def files(photos: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photos.iterdir())]


def published(timm_data: Any, size: int, **changes: object) -> Any:
    """The call of microsoft/SimMIM:data/data_finetune.py with the values of its config.py."""
    options = {
        "input_size": size,
        "is_training": True,
        "color_jitter": 0.4,
        "auto_augment": RAND_AUGMENT,
        "re_prob": 0.25,
        "re_mode": "pixel",
        "re_count": 1,
        "interpolation": "bicubic",
    }
    return timm_data.create_transform(**options | changes)


@pytest.mark.parametrize("size", [64, 224])
def test_training_views_are_the_published_ones(
    timm_data: Any, files: list[bytes], keys: list[int], size: int
) -> None:
    view = TrainingView(Pixels((size, size), MEAN, STD), seed=3)
    assert not view.note
    theirs = published(timm_data, size)
    for sample, data in enumerate(files):
        ours = view(data, 1, sample)
        seed_generators(keys[-1])
        wanted = theirs(Image.fromarray(decode(data, 3)))
        assert ours.dtype == np.float32
        assert torch.equal(torch.from_numpy(ours), wanted)


def test_colour_jitter_without_a_policy(
    timm_data: Any, files: list[bytes], keys: list[int]
) -> None:
    view = TrainingView(COLOUR, 0, AugmentConfig(auto_augment="", erase=0.0))
    theirs = published(timm_data, 64, auto_augment=None, re_prob=0.0)
    assert "ColorJitter" in str(theirs)
    assert "ColorJitter" not in str(published(timm_data, 64))
    for sample, data in enumerate(files[:6]):
        ours = view(data, 0, sample)
        seed_generators(keys[-1])
        wanted = theirs(Image.fromarray(decode(data, 3)))
        assert torch.equal(torch.from_numpy(ours), wanted)


def test_small_views_are_shifted_as_published(
    timm_data: Any, transforms: Any, keys: list[int]
) -> None:
    view = TrainingView(SMALL, seed=0)
    theirs = published(timm_data, 32)
    theirs.transforms[0] = transforms.RandomCrop(32, padding=4)
    picture = noise(32, 32)
    for epoch in range(20):
        ours = view(encoded(picture), epoch, 0)
        seed_generators(keys[-1])
        assert torch.equal(torch.from_numpy(ours), theirs(Image.fromarray(picture)))


def test_small_views_of_large_images_show_most_of_them(timm_data: Any) -> None:
    plain = AugmentConfig(auto_augment="", color_jitter=0.0, erase=0.0, flip=0.0)
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))
    view = TrainingView(SMALL, 0, plain)(encoded(np.ascontiguousarray(ramp)), 0, 0)
    steps = np.diff(view[0] * STD[0] * 255, axis=0)
    assert np.median(steps) == pytest.approx(8, abs=0.1)  # 256 rows in 32


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (48, 80)])
def test_grey_images_take_the_whole_recipe(
    timm_data: Any, files: list[bytes], keys: list[int], size: tuple[int, int]
) -> None:
    view = TrainingView(Pixels(size, (0.45,), (0.23,)), seed=1)
    assert not view.note
    seen = {view(files[i % 4], i, 0).tobytes() for i in range(200)}  # every operation of the policy
    assert len(seen) > 190  # posterised to no bits, some are equal
    if max(size) > 32:
        theirs = published(timm_data, size, mean=(0.45,), std=(0.23,))  # type: ignore[arg-type]
        ours = view(files[0], 0, 9)
        seed_generators(keys[-1])
        wanted = theirs(Image.fromarray(decode(files[0], 1)[:, :, 0]))
        assert torch.equal(torch.from_numpy(ours), wanted)


def test_posterising_to_no_bits_is_black(timm_data: Any, files: list[bytes]) -> None:
    # at magnitude 10; the published policy (9 ± 0.5) comes to it now and then
    view = TrainingView(COLOUR, 0, AugmentConfig(auto_augment="rand-m10-n1-inc1", erase=0.0))
    black = normalised(np.zeros((64, 64, 3), dtype=np.uint8), COLOUR)
    views = [view(files[0], epoch, 0) for epoch in range(120)]
    assert 0 < sum(np.array_equal(made, black) for made in views) < 20
    for policy in ("v0-mstd9", "rand-m10-mstd9-inc1", "augmix-m10-mstd9"):
        view = TrainingView(SMALL, 0, AugmentConfig(auto_augment=policy))
        for epoch in range(300):
            view(encoded(noise(32, 32)), epoch, 0)


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


def normalised(image: np.ndarray, pixels: Pixels) -> np.ndarray:
    unit = np.moveaxis(image, -1, 0).astype(np.float32) / np.float32(255)
    mean = np.array(pixels.mean, dtype=np.float32)[:, None, None]
    std = np.array(pixels.std, dtype=np.float32)[:, None, None]
    return (unit - mean) / std


def scaled_rows_first(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to (width, height) as Pillow up to 12 does; later ones may begin with the columns."""
    bicubic = Image.Resampling.BICUBIC
    return image.resize((size[0], image.height), bicubic).resize(size, bicubic)


@pytest.mark.parametrize("size", [32, 64, 192, 224])
def test_evaluation_views_are_torchvisions(transforms: Any, files: list[bytes], size: int) -> None:
    pixels = Pixels((size, size), MEAN, STD)
    bicubic = transforms.InterpolationMode.BICUBIC
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = transforms.CenterCrop(size)
    chains = {
        256 / 224: (transforms.Resize(int((256 / 224) * size), interpolation=bicubic), [crop]),
        1: (transforms.Resize(size, interpolation=bicubic), [crop]),
        0: (transforms.Resize((size, size), interpolation=bicubic), []),
    }
    for margin, (resize, crops) in chains.items():
        view, theirs = EvaluationView(pixels, margin), transforms.Compose(crops + end)
        for data in files:
            picture = Image.fromarray(decode(data, 3))
            wanted = theirs(scaled_rows_first(picture, resize(picture).size))
            assert torch.equal(torch.from_numpy(view(data)), wanted)
    default = EvaluationView(pixels)
    published_margin = 1 if size <= 32 else 256 / 224
    assert np.array_equal(default(files[0]), EvaluationView(pixels, published_margin)(files[0]))


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


def test_crops_of_a_single_pixel_hold_it(timm_data: Any) -> None:
    white = np.full((1, 1, 3), 255, dtype=np.uint8)
    view = TrainingView(COLOUR, 0, AugmentConfig(auto_augment="", color_jitter=0.0, erase=0.0))
    wanted = normalised(np.full((64, 64, 3), 255, dtype=np.uint8), COLOUR)
    for epoch in range(20):
        assert np.array_equal(view(encoded(white), epoch, 0), wanted)


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
