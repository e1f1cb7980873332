"""Crop, resize and flip in NumPy, with the fixed-point arithmetic of Pillow's Resample.c."""

import math

import numpy as np
from numpy.typing import NDArray

PRECISION = 22  # bits after the point of a weight
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def _sinc(x: float) -> float:
    # the C library's sine, as in Pillow: NumPy's own may differ in the last bit
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _share(filter: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """What inputs at distance x, in units of the stretched pixel, have in an output."""
    if filter == "lanczos":
        return np.array([_sinc(v) * _sinc(v / 3) if -3 <= v < 3 else 0.0 for v in x.tolist()])
    x, a = np.abs(x), -0.5
    if filter == "bilinear":
        return np.maximum(1 - x, 0)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _resize(image: NDArray[np.uint8], outputs: int, filter: str) -> NDArray[np.uint8]:
    """Along the first axis: uint8 [inputs, …] → [outputs, …]."""
    inputs, scale = len(image), len(image) / outputs
    stretch = max(scale, 1.0)
    centre, reach = (np.arange(outputs) + 0.5) * scale, SUPPORT[filter] * stretch
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach + 0.5).astype(np.int64), inputs)
    taps = [first + t for t in range(int((end - first).max()))]
    shares = [
        np.where(i < end, _share(filter, (i - centre + 0.5) * (1 / stretch)), 0) for i in taps
    ]
    total = sum(shares[1:], shares[0])
    sums = np.full((outputs, *image.shape[1:]), 1 << (PRECISION - 1), dtype=np.int64)
    for i, share in zip(taps, shares):
        scaled = share / total * (1 << PRECISION)
        weight = (scaled + np.copysign(0.5, scaled)).astype(np.int64)
        sums += image[np.minimum(i, inputs - 1)] * weight[:, None, None]
    pixels: NDArray[np.uint8] = np.clip(sums >> PRECISION, 0, 255).astype(np.uint8)
    return pixels


def crop_resize(
    image: NDArray[np.uint8], box: tuple[int, ...], size: tuple[int, ...], flip: bool, filter: str
) -> NDArray[np.uint8]:
    """Along the rows, rounded to bytes, and then along the columns → uint8 [h, w, C].

    No op of torch.library: it runs on NumPy arrays in processes that load data, and has no
    gradient.
    """
    left, top, width, height = box
    view = image[top : top + height, left : left + width].swapaxes(0, 1)
    view = _resize(_resize(view, size[1], filter).swapaxes(0, 1), size[0], filter)
    return view[:, ::-1] if flip else view
