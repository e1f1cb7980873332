"""Views of labelled images against timm and torchvision: the published recipe to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from labelled_images import (
    COLOUR,
    MEAN,
    SMALL,
    STD,
    encoded,
    noise,
    normalised,
    peer,
    scaled_rows_first,
    seed_generators,
)
from simmim.config.finetune import AugmentConfig
from simmim.data.decode import decode
from simmim.data.finetune_views import EvaluationView, Pixels, TrainingView

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


def test_crops_of_a_single_pixel_hold_it(timm_data: Any) -> None:
    white = np.full((1, 1, 3), 255, dtype=np.uint8)
    view = TrainingView(COLOUR, 0, AugmentConfig(auto_augment="", color_jitter=0.0, erase=0.0))
    wanted = normalised(np.full((64, 64, 3), 255, dtype=np.uint8), COLOUR)
    for epoch in range(20):
        assert np.array_equal(view(encoded(white), epoch, 0), wanted)
