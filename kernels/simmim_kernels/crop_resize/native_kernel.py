"""Calls the C++ kernel of crop_resize with the addresses of arrays."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simmim_kernels import native

FILTER_CODES = {"bilinear": 0, "bicubic": 1, "lanczos": 2}


def reasons_against(*tensors: Tensor | None) -> list[str]:
    """Why the kernel cannot run; empty when it can. It takes whatever the op does."""
    return [] if native.missing_reason is None else [native.missing_reason]


def forward(
    image: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    flip: bool,
    filter: str,
    out: NDArray[np.uint8],
) -> None:
    """Writes `out`, uint8 [h, w, C]."""
    assert native.extension is not None
    native.extension.crop_resize(
        image.ctypes.data,
        image.strides[0],
        image.shape,
        box,
        FILTER_CODES[filter],
        flip,
        out.ctypes.data,
        size,
    )
