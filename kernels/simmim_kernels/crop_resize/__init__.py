"""Crop, resize with antialiasing and flip an image of bytes, as Pillow does, to the bit."""

from operator import index
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simmim_kernels.crop_resize import native_kernel, reference
from simmim_kernels.dispatch import Backend, choose, never

__all__ = ["BACKENDS", "Filter", "crop_resize"]

Filter = Literal["bilinear", "bicubic", "lanczos"]

BACKENDS = (
    Backend("native", native_kernel.reasons_against),
    Backend("reference", never),
)


def crop_resize(
    image: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    flip: bool = False,
    filter: Filter = "bilinear",
    out: NDArray[np.uint8] | None = None,
    backend: str | None = None,
) -> NDArray[np.uint8]:
    """Cut a box out of an image, resize it and mirror it.

    It works on NumPy arrays in one thread, for worker processes that load data: therefore it is
    no op of torch.library, and has no gradient. The native backend releases Python's lock.

    Args:
        image: uint8 [H, W, C], any C; the pixels of a row contiguous, rows at any stride.
        box: (left, top, width, height) within the image, whole pixels.
        size: (h, w) of the result, pixels.
        flip: mirror left and right after resizing.
        filter: its support is 1 ("bilinear"), 2 ("bicubic") or 3 ("lanczos") pixels of the
            larger of box and result.
        out: uint8 [h, w, C], C-contiguous, to write to; must not overlap `image`.
        backend: "native" or "reference", which give the same bytes; None takes the first that
            can run.

    Returns:
        uint8 [h, w, C]; `out` where it was given.

    Raises:
        ValueError: an array is not as above, the box is empty or not within the image, the size
            is not positive, or the filter is unknown.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: python-pillow/Pillow src/libImaging/Resample.c, rows first, as Pillow before 13 always
        and later ones mostly do (README.md). Channels are resized one by one: to RGBA, whose
        colours Pillow multiplies with alpha first, this is not the same.
    """
    left, top, width, height = map(index, box)
    h, w = map(index, size)
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"image {image.shape} {image.dtype} must be uint8 [H, W, C]")
    H, W, C = image.shape
    if not (0 <= left < left + width <= W and 0 <= top < top + height <= H) or C == 0:
        raise ValueError(
            f"box (left {left}, top {top}, width {width}, height {height}) must hold pixels and "
            f"lie within image {image.shape}"
        )
    strides = image.strides
    if (C > 1 and strides[2] != 1) or (W > 1 and strides[1] != C):
        raise ValueError(
            f"image {image.shape} must have contiguous pixels in a row; its strides are {strides}"
        )
    if h < 1 or w < 1:
        raise ValueError(f"size (height {h}, width {w}) must be positive")
    if filter not in reference.SUPPORT:
        known = ", ".join(reference.SUPPORT)
        raise ValueError(f"filter={filter!r} is unknown; known are {known}")
    if out is None:
        out = np.empty((h, w, C), dtype=np.uint8)
    else:
        flags = out.flags
        if out.dtype != np.uint8 or out.shape != (h, w, C):
            raise ValueError(f"out {out.shape} {out.dtype} must be uint8 {(h, w, C)}")
        if not (flags.c_contiguous and flags.writeable):
            raise ValueError(f"out {out.shape} must be C-contiguous and writeable")
    if choose("crop_resize", BACKENDS, (), backend) == "native":
        native_kernel.forward(image, (left, top, width, height), (h, w), flip, filter, out)
    else:
        out[:] = reference.crop_resize(image, (left, top, width, height), (h, w), flip, filter)
    return out
