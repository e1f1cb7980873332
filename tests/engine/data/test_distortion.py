"""Colour and blur of views: the pixels of Pillow, from keys alone."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from noisy_pictures import pictures
from simmim.data import distortion
from simmim.data.distortion import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Distortion,
    Draws,
    distort,
    draw,
    uniforms,
)
from simmim_kernels.splitmix import fold, signed, uniform

# of samples 0 and 12345 in epochs 0 and 3
PINNED_ORDER = [[1, 3, 2, 0], [2, 3, 1, 0]]
PINNED_SHIFT = [24.0, -16.0]
PINNED_SIGMA = [1.989920872983864, 1.5903129913437033]

ENHANCERS = {
    BRIGHTNESS: ImageEnhance.Brightness,
    CONTRAST: ImageEnhance.Contrast,
    SATURATION: ImageEnhance.Color,
}


def untouched(count: int) -> Draws:
    """Draws that change nothing."""
    none = torch.zeros(count, dtype=torch.bool)
    order = torch.arange(4).repeat(count, 1)
    factors = torch.ones(count, 3)
    zeros = torch.zeros(count, dtype=torch.float64)
    return Draws(none, order, factors, zeros, none, none, zeros + 1.0)


def turn_hue(image: Image.Image, shift: int) -> Image.Image:
    """torchvision's adjust_hue of a Pillow image, with the shift in whole steps."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int64) + shift) % 256
    bands = (Image.fromarray(turned.astype(np.uint8)), saturation, value)
    return Image.merge("HSV", bands).convert("RGB")


def by_pillow(pixels: np.ndarray, draws: Draws, number: int) -> np.ndarray:
    """What Pillow makes of image `number`, in torchvision's order."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if draws.jittered[number]:
        for operation in draws.order[number].tolist():
            if operation == HUE:
                image = turn_hue(image, int(draws.shift[number]))
            else:
                factor = float(draws.factors[number, operation])
                image = ENHANCERS[operation](image).enhance(factor)
    if draws.grey[number] and image.mode == "RGB":
        image = image.convert("L").convert("RGB")
    if draws.blurred[number]:
        image = image.filter(ImageFilter.GaussianBlur(float(draws.sigma[number])))
    return np.asarray(image).reshape(pixels.shape)


def distorted(images: np.ndarray, draws: Draws, **options: bool) -> np.ndarray:
    out = distort(torch.from_numpy(images), draws, 2.0, **options)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_that_is_drawn_gives_pillows_pixels(channels: int, everywhere: bool) -> None:
    count = 48
    images = pictures(count, channels=channels)
    ids = torch.arange(count)
    draws = draw(ids, torch.full_like(ids, 2), 1, 7, Distortion(jitter_probability=0.9))
    found = distorted(images, draws, everywhere=everywhere)
    changed = 0
    for number in range(count):
        expected = by_pillow(images[number], draws, number)
        np.testing.assert_array_equal(found[number], expected, err_msg=f"image {number}")
        changed += bool((expected != images[number]).any())
    assert changed > count / 2


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.6, 0.99, 1.0, 1.01, 1.4, 1.9])
def test_enhancement(operation: int, factor: float) -> None:
    images = pictures(4)
    draws = untouched(4)
    factors = draws.factors.clone()
    factors[:, operation] = factor
    draws = draws._replace(jittered=torch.ones(4, dtype=torch.bool), factors=factors)
    # the hue goes to HSV and back, which changes pixels even where it is not moved
    for number, found in enumerate(distorted(images, draws)):
        expected = ENHANCERS[operation](Image.fromarray(images[number])).enhance(factor)
        np.testing.assert_array_equal(found, np.asarray(turn_hue(expected, 0)))


@pytest.mark.parametrize("shift", [-128, -26, -1, 0, 7, 25, 127])
def test_hue_of_every_kind_of_colour(shift: int) -> None:
    levels = np.array([0, 1, 2, 63, 64, 100, 127, 128, 129, 200, 254, 255], np.uint8)
    colours = np.array(list(itertools.product(levels, repeat=3)), np.uint8).reshape(1, 36, 48, 3)
    draws = untouched(1)._replace(
        jittered=torch.ones(1, dtype=torch.bool),
        shift=torch.tensor([shift], dtype=torch.float64),
    )
    expected = np.asarray(turn_hue(Image.fromarray(colours[0]), shift))
    np.testing.assert_array_equal(distorted(colours, draws)[0], expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 40), (31, 5)])
def test_blur_of_any_size_and_deviation(size: tuple[int, int]) -> None:
    sigmas = torch.linspace(0.1, 4.0, 24, dtype=torch.float64)
    images = pictures(24, (40, 40))[:, : size[0], : size[1]]
    draws = untouched(24)._replace(blurred=torch.ones(24, dtype=torch.bool), sigma=sigmas)
    found = distort(torch.from_numpy(images), draws, 4.0).permute(0, 2, 3, 1).numpy()
    for number, sigma in enumerate(sigmas.tolist()):
        expected = Image.fromarray(images[number]).filter(ImageFilter.GaussianBlur(sigma))
        np.testing.assert_array_equal(found[number], np.asarray(expected), err_msg=f"σ {sigma}")


def test_other_channels_are_blurred_alone() -> None:
    images = pictures(6, channels=5)
    ids = torch.arange(6)
    draws = draw(ids, torch.zeros_like(ids), 0, 0, Distortion(jitter_probability=1, grey=1, blur=1))
    found = distorted(images, draws)
    for number in range(6):
        blur = ImageFilter.GaussianBlur(float(draws.sigma[number]))
        for band in range(5):
            expected = np.asarray(Image.fromarray(images[number, ..., band]).filter(blur))
            np.testing.assert_array_equal(found[number, ..., band], expected)


def test_torchvisions_jitter_is_the_same() -> None:
    try:
        from torchvision.transforms import functional
    except Exception as error:  # raises all kinds beside a torch that it was not built for
        pytest.skip(f"torchvision cannot be imported: {error}")
    apply = {
        BRIGHTNESS: functional.adjust_brightness,
        CONTRAST: functional.adjust_contrast,
        SATURATION: functional.adjust_saturation,
    }
    images, ids = pictures(24), torch.arange(24)
    wanted = Distortion(jitter_probability=1, grey=0, blur=0)
    draws = draw(ids, torch.zeros_like(ids), 0, 1, wanted)
    for number, found in enumerate(distorted(images, draws)):
        image = Image.fromarray(images[number])
        for operation in draws.order[number].tolist():
            if operation == HUE:
                # half a step further in: the factor times 255 is cut to whole steps
                step = float(draws.shift[number])
                image = functional.adjust_hue(image, (step + np.copysign(0.5, step)) / 255)
            else:
                image = apply[operation](image, float(draws.factors[number, operation]))
        np.testing.assert_array_equal(found, np.asarray(image))


def test_the_batch_of_a_sample_does_not_matter() -> None:
    images = pictures(9)
    ids, epochs = torch.arange(40, 49), torch.tensor([0, 1, 2] * 3)
    whole = distorted(images, draw(ids, epochs, 0, 3, Distortion()))
    for number in range(9):
        one = slice(number, number + 1)
        alone = draw(ids[one], epochs[one], 0, 3, Distortion())
        np.testing.assert_array_equal(distorted(images[one], alone)[0], whole[number])


def test_uniforms_are_those_of_splitmix() -> None:
    keys = [fold(1, 2, 3), fold(2**63 + 5), 0]
    found = uniforms(torch.tensor([signed(key) for key in keys]), 6)
    assert found.tolist() == [[uniform(key, counter) for counter in range(6)] for key in keys]


def test_draws_follow_the_key_for_good() -> None:
    ids = torch.tensor([0, 12345])
    draws = draw(ids, torch.tensor([0, 3]), 1, 11, Distortion())
    # changing what a key gives would break resuming
    assert draws.order.tolist() == PINNED_ORDER
    assert draws.shift.tolist() == PINNED_SHIFT
    assert draws.sigma.tolist() == pytest.approx(PINNED_SIGMA, rel=1e-12)
    other = draw(ids, torch.tensor([0, 3]), 0, 11, Distortion())
    assert not torch.equal(draws.factors, other.factors)


def test_what_is_drawn_has_the_published_frequencies() -> None:
    count = 20_000
    ids = torch.arange(count)
    draws = draw(ids, torch.zeros_like(ids), 0, 5, Distortion())
    for chosen, probability in ((draws.jittered, 0.8), (draws.grey, 0.2), (draws.blurred, 0.5)):
        allowed = 4 * (probability * (1 - probability) / count) ** 0.5
        assert chosen.double().mean().item() == pytest.approx(probability, abs=allowed)
    # uniform: mean 1, deviation 0.8 / √12
    assert draws.factors.mean(0).tolist() == pytest.approx([1.0] * 3, abs=4 * 0.231 / count**0.5)
    assert draws.factors.min() >= 0.6
    assert draws.factors.max() <= 1.4
    assert draws.shift.min() == -25
    assert draws.shift.max() == 25
    assert draws.sigma.min() >= 0.1
    assert draws.sigma.max() <= 2.0
    orders, counts = draws.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert counts.double().sub(count / 24).abs().max() < 4.5 * (count / 24) ** 0.5


def test_what_is_drawn_has_the_configured_ranges_and_frequencies() -> None:
    """Settings that are nobody's defaults, each of them another."""
    count = 20_000
    ids = torch.arange(count)
    wanted = Distortion(
        jitter=(0.1, 0.2, 1.5, 0.3),
        jitter_probability=0.3,
        grey=0.6,
        blur=0.9,
        blur_sigma=(1.0, 4.0),
    )
    draws = draw(ids, torch.zeros_like(ids), 0, 5, wanted)
    for chosen, probability in ((draws.jittered, 0.3), (draws.grey, 0.6), (draws.blurred, 0.9)):
        allowed = 4 * (probability * (1 - probability) / count) ** 0.5
        assert chosen.double().mean().item() == pytest.approx(probability, abs=allowed)
    near = {"abs": 3e-3}
    assert draws.factors.amin(0).tolist() == pytest.approx([0.9, 0.8, 0.0], **near)
    assert draws.factors.amax(0).tolist() == pytest.approx([1.1, 1.2, 2.5], **near)
    assert (draws.shift.min(), draws.shift.max()) == (-76, 76)  # 0.3 · 255
    assert draws.sigma.min().item() == pytest.approx(1.0, **near)
    assert draws.sigma.max().item() == pytest.approx(4.0, **near)


@pytest.mark.parametrize(("probability", "chosen"), [(0.0, False), (1.0, True)])
def test_never_and_always(probability: float, chosen: bool) -> None:
    wanted = Distortion(jitter_probability=probability, grey=probability, blur=probability)
    ids = torch.arange(1000)
    draws = draw(ids, torch.zeros_like(ids), 0, 5, wanted)
    for found in (draws.jittered, draws.grey, draws.blurred):
        assert found.tolist() == [chosen] * 1000


def test_no_two_draws_share_a_number() -> None:
    """What is drawn of a view, of the other, of another epoch and seed does not go together."""
    count = 10_000
    ids = torch.arange(count)
    columns = []
    for epoch, view, seed in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1)):
        draws = draw(ids, torch.full_like(ids, epoch), view, seed, Distortion())
        first = draws.order[:, 0] == BRIGHTNESS
        some = (draws.jittered, first, draws.shift, draws.grey, draws.blurred, draws.sigma)
        columns += [*some, *draws.factors.unbind(1)]
    table = torch.stack([column.double() for column in columns])
    together = torch.corrcoef(table) - torch.eye(len(table))
    assert together.abs().max() < 5 / count**0.5


def test_a_large_batch_is_distorted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    images, ids = pictures(7), torch.arange(7)
    draws = draw(ids, torch.zeros_like(ids), 0, 3, Distortion())
    whole = distorted(images, draws)
    pixels = images.shape[1] * images.shape[2]
    sizes = []
    in_one_part = distortion._distort

    def noted(image: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sizes.append(len(image))
        return in_one_part(image, *arguments)

    monkeypatch.setattr(distortion, "_distort", noted)
    monkeypatch.setattr(distortion, "CPU_PIXELS", 3 * pixels + 1)
    np.testing.assert_array_equal(distorted(images, draws), whole)
    assert sizes == [3, 3, 1]
    monkeypatch.setattr(distortion, "CPU_PIXELS", 1)
    np.testing.assert_array_equal(distorted(images, draws), whole)
    assert sizes[3:] == [1] * 7
