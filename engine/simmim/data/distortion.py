"""Colour jitter, grey and blur of whole batches, with the pixels of torchvision on Pillow images.

Runs where the batch lies, on the CPU or a GPU, and reads nothing back there: every draw is a
function of (seed, epoch, sample), made on the device. Values are whole numbers after every
operation, as Pillow stores them, so that the result does not depend on where it was computed.

N images, C channels, H W pixels. Source: Chen and He 2020 (arXiv 2011.10566), appendix A, which
takes them from SimCLR; ranges as torchvision's ColorJitter takes them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simmim.config.bounds import bounded
from simmim_kernels.splitmix import GAMMA, fold, fold_tensor, mix_tensor, signed

# Keeps these draws apart from those of other uses of the same (seed, epoch, sample).
STREAM = 0x64697374  # "dist"

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# Pixels that the CPU works on at a time: their planes stay in its caches.
CPU_PIXELS = 2**16

Where = Callable[..., Tensor]  # one of the two below

# Pillow's integer weights of a grey value, in 2^-16, and of a blurred one, in 2^-24.
_LUMA = (19595, 38470, 7471)
_BLUR_BITS = 24
_BLUR_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """What is drawn for every view: settings of a method that distorts its views.

    Brightness, contrast and saturation are jittered by factors from 1 - s to 1 + s, the hue by a
    shift from -s to s of the colour circle, which is at most 0.5; in random order.
    """

    jitter: tuple[float, float, float, float] = bounded((0.4, 0.4, 0.4, 0.1), low=0)
    """Strengths s of the jitter of brightness, contrast, saturation and hue."""
    jitter_probability: float = bounded(0.8, low=0, high=1)
    """Probability of the jitter."""
    grey: float = bounded(0.2, low=0, high=1)
    """Probability of losing the colour."""
    blur: float = bounded(0.5, low=0, high=1)
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = bounded((0.1, 2.0), low=0, order="rising")
    """Smallest and largest standard deviation of the blur, in pixels."""


class Draws(NamedTuple):
    """What is done to every image; all on one device.

    Attributes:
        jittered: bool [N].
        order: int64 [N, 4], the operations (BRIGHTNESS …) in their order.
        factors: float32 [N, 3], of brightness, contrast and saturation; 1 changes nothing.
        shift: float64 [N], whole steps of 1/256 of the circle that the hue moves.
        grey: bool [N].
        blurred: bool [N].
        sigma: float64 [N], of the blur, in pixels.
    """

    jittered: Tensor
    order: Tensor
    factors: Tensor
    shift: Tensor
    grey: Tensor
    blurred: Tensor
    sigma: Tensor


def draw(ids: Tensor, epochs: Tensor, view: int, seed: int, distortion: Distortion) -> Draws:
    """What happens to view number `view` (0 or 1) of samples, a pure function of its arguments.

    Args:
        ids: int64 [N], of the samples.
        epochs: int64 [N].
        view: of the sample.
        seed: the run's seed.
        distortion: what is drawn.
    """
    keys = fold_tensor(fold_tensor(fold(STREAM, seed), 2 * epochs + view), ids)
    u = uniforms(keys, 12)
    # Python's numbers: a tensor of them would have to be sent to the device
    *strengths, turn = distortion.jitter
    ranges = [(max(0.0, 1.0 - strength), 1.0 + strength) for strength in strengths]
    factors = [low + (high - low) * u[:, 5 + i] for i, (low, high) in enumerate(ranges)]
    low_sigma, high_sigma = distortion.blur_sigma
    return Draws(
        u[:, 0] < distortion.jitter_probability,
        u[:, 1:5].argsort(dim=1),
        torch.stack(factors, dim=1).float(),
        (turn * (2.0 * u[:, 8] - 1.0) * 255.0).trunc(),
        u[:, 9] < distortion.grey,
        u[:, 10] < distortion.blur,
        low_sigma + (high_sigma - low_sigma) * u[:, 11],
    )


def uniforms(keys: Tensor, count: int) -> Tensor:
    """Draws 0 … count - 1 of every stream: `splitmix.uniform`, as float64 [N, count]."""
    counters = torch.arange(1, count + 1, device=keys.device)
    z = mix_tensor(keys[:, None] + counters * signed(GAMMA))
    return ((z >> 11) & (2**53 - 1)).double() * 2.0**-53


def distort(
    image: Tensor, draws: Draws, largest_sigma: float, *, everywhere: bool | None = None
) -> Tensor:
    """Jitter, grey and blur a batch.

    One channel has neither saturation nor hue; other numbers than 1 and 3 are blurred only.

    Args:
        image: uint8 [N, H, W, C].
        draws: what is done.
        largest_sigma: that occurs among the draws, or could.
        everywhere: do every operation to all images and choose afterwards, instead of asking which
            images need it; None does so on a GPU, where asking waits for the device.

    Returns:
        uint8 [N, C, H, W], contiguous.
    """
    pixels = image.shape[1] * image.shape[2]
    everywhere = image.is_cuda if everywhere is None else everywhere
    where = _where_everywhere if everywhere else _where_chosen
    size = len(image) if image.is_cuda else max(1, CPU_PIXELS // pixels)
    parts = [slice(start, start + size) for start in range(0, len(image), size)]
    done = [
        _distort(image[part], Draws(*(values[part] for values in draws)), largest_sigma, where)
        for part in parts
    ]
    return torch.cat(done)


def _distort(image: Tensor, draws: Draws, largest_sigma: float, where: Where) -> Tensor:
    channels = image.shape[-1]
    x = image.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if channels in (1, 3):
        x = _jitter(x, draws, where)
    if channels == 3:
        x = where(draws.grey, lambda x: _grey(x).expand_as(x), x)
    blur = functools.partial(_blur, largest_sigma=largest_sigma)
    return where(draws.blurred, blur, x, draws.sigma).to(torch.uint8)


def _jitter(x: Tensor, draws: Draws, where: Where) -> Tensor:
    jittered, order = draws.jittered, draws.order
    hue_at = (order == HUE).to(torch.uint8).argmax(dim=1)
    # Hue costs most and may have to be done to all images, so it stands once, between the
    # blends that come before it and those that come after it.
    for place in range(3):
        x = where(jittered & (hue_at > place), _blend, x, order[:, place], draws.factors)
    if x.shape[1] == 3:
        x = where(jittered, _turn_hue, x, draws.shift)
    for place in range(1, 4):
        x = where(jittered & (hue_at < place), _blend, x, order[:, place], draws.factors)
    return x


def _where_everywhere(
    chosen: Tensor, change: Callable[..., Tensor], x: Tensor, *parameters: Tensor
) -> Tensor:
    """`change(x, *parameters)` of the chosen images; the others as they are."""
    return torch.where(chosen[:, None, None, None], change(x, *parameters), x)


def _where_chosen(
    chosen: Tensor, change: Callable[..., Tensor], x: Tensor, *parameters: Tensor
) -> Tensor:
    """As `_where_everywhere`, but of the chosen images alone; `x` is changed in place."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == len(x):
        return change(x, *parameters).contiguous()  # grey is expanded: not to be written into
    if len(rows):
        x[rows] = change(x[rows], *(values[rows] for values in parameters))
    return x


def _grey(x: Tensor) -> Tensor:
    """Pillow's conversion to "L", [N, C, H, W] → [N, 1, H, W]; grey images are it already."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    # below 2^24, hence exact in float32
    sum_ = (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2])
    return sum_.add_(2**15).mul_(2.0**-16).floor_()


def _blend(x: Tensor, operation: Tensor, factors: Tensor) -> Tensor:
    """ImageEnhance: away from black, from the mean grey, or from the pixel's own grey."""
    factor = factors.gather(1, operation.clamp(max=2)[:, None])[:, :, None, None]
    grey = _grey(x)
    mean = (grey.mean(dim=(1, 2, 3), dtype=torch.float64) + 0.5).floor().float()
    level = torch.where(operation == CONTRAST, mean, 0.0)[:, None, None, None]
    # grey · 1 + 0, grey · 0 + mean, or grey · 0 + 0
    degenerate = grey * (operation == SATURATION)[:, None, None, None] + level
    return (x - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).floor_()


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Pillow's hue plus `shift` modulo 256; to HSV and back, rounded as Pillow's C code rounds.

    Choices between whole numbers are sums with factors 0 and 1: on the CPU `torch.where` takes
    several times as long.
    """
    value = x.amax(1)
    chroma = value - x.amin(1)
    hue = _hue(x, value, chroma) + shift[:, None, None].float()
    hue = hue - 256.0 * (hue * (1 / 256)).floor_()
    # where C computes in double precision, so does this
    saturation = (chroma / value.clamp(min=1.0)).double().mul_(255.0).floor_()
    share = saturation.div_(255.0).float()
    turned = (hue * 6.0).double().div_(255.0)
    sector = turned.floor()
    part = turned.sub_(sector).float()
    odd = sector - 2.0 * (sector * 0.5).floor_()
    falling = (share * part).double().mul_(odd)
    rising = share.double().mul_(1.0 - part.double()).mul_(1.0 - odd)
    middle = _rounded((1.0 - falling.add_(rising)).mul_(value)).float()
    lowest = _rounded((1.0 - share).mul_(value))

    # the sector's centre; 255 · 6 / 255 is the first sector again
    centre = sector.float().add_(0.5)
    centre = centre - 6.0 * (centre * (1 / 6)).floor_()
    upper, lower = value - middle, middle - lowest
    bands = []
    # distance from where the band is highest: value up to 1, middle up to 2, then lowest
    for away in (3.0 - (centre - 3.0).abs(), (centre - 2.0).abs(), (centre - 4.0).abs()):
        band = (1.5 - away).clamp_(0, 1).mul_(upper)
        bands.append(band.add_((2.5 - away).clamp_(0, 1).mul_(lower)).add_(lowest))
    return torch.stack(bands, dim=1)


def _hue(x: Tensor, value: Tensor, chroma: Tensor) -> Tensor:
    """0 … 255, as Pillow finds it; 0 where there is no colour."""
    below = value[:, None] - x
    red, green, blue = (below / chroma.clamp(min=1.0)[:, None]).unbind(1)
    not_red, not_green, _ = below.clamp_(max=1.0).unbind(1)
    from_green = (2.0 + red.double()).sub_(blue).float().mul_(1.0 - not_green)
    from_blue = (4.0 + green.double()).sub_(red).float().mul_(not_green)
    sixths = from_green.add_(from_blue).mul_(not_red).add_((blue - green).mul_(1.0 - not_red))
    circle = sixths.double().div_(6.0).add_(1.0)
    circle = circle.sub_(circle.floor()).float()
    return circle.double().mul_(255.0).floor_().float().mul_(chroma.clamp(max=1.0))


def _rounded(x: Tensor) -> Tensor:
    # C rounds halves away from zero; x is not negative
    return x.add_(0.5).floor_()


def _blur(x: Tensor, sigma: Tensor, *, largest_sigma: float) -> Tensor:
    """Pillow's Gaussian: three box blurs a direction, each rounded to whole values."""
    reach = int(blur_radius(torch.tensor(largest_sigma, dtype=torch.float64))) + 1
    radius = blur_radius(sigma)
    whole = radius.floor()
    inner = (2**_BLUR_BITS / (2.0 * radius.float() + 1.0)).floor().double()
    edge = ((2**_BLUR_BITS - (2.0 * whole + 1.0) * inner) / 2.0).floor()
    # weights of the pixels 0, 1, … `reach` away
    away = torch.arange(reach + 1, device=x.device)[:, None]
    weights = torch.where(away <= whole, inner, torch.where(away == whole + 1, edge, 0.0))
    pixels = x.to(torch.int32)
    for axis in (3, 2):
        for _ in range(_BLUR_PASSES):
            pixels = _box_blur(pixels, weights.to(torch.int32)[:, :, None, None, None], axis)
    return pixels.to(x.dtype)


def blur_radius(sigma: Tensor) -> Tensor:
    """Radius of the box that, applied three times, has the deviation `sigma`; both float64.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering"; in float32 as in Pillow.
    """
    sigma = sigma.float()
    variance = sigma * sigma / _BLUR_PASSES
    length = (12.0 * variance.double() + 1.0).sqrt().float()
    whole = ((length.double() - 1.0) / 2.0).floor().float()
    extra = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    extra = extra / (6 * (variance - (whole + 1) * (whole + 1)))
    return (whole + extra).double()


def _box_blur(pixels: Tensor, weights: Tensor, axis: int) -> Tensor:
    reach, length = len(weights) - 1, pixels.shape[axis]
    if length <= reach:
        places = torch.arange(-reach, length + reach, device=pixels.device).clamp(0, length - 1)
        padded = pixels.index_select(axis, places)
    else:
        first = pixels.narrow(axis, 0, 1)
        last = pixels.narrow(axis, length - 1, 1)
        padded = torch.cat([first] * reach + [pixels] + [last] * reach, dim=axis)
    # up to 255 · 2^24 + 2^23, which is below 2^32: the sum wraps, its upper eight bits are right
    total = pixels * weights[0]
    for away in range(1, reach + 1):
        before = padded.narrow(axis, reach - away, length)
        after = padded.narrow(axis, reach + away, length)
        total.add_((before + after).mul_(weights[away]))
    return (total.add_(2 ** (_BLUR_BITS - 1)) >> _BLUR_BITS).bitwise_and_(255)
