"""Calls the C++ kernels of masked_l1_loss with the addresses of tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.masked_l1_loss.signs import signs_shape


def forward(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    stride: int,
    norm_target: int,
    keep_signs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient per hidden pixel, and the gradient's signs ([0] when they are not kept)."""
    assert native.extension is not None
    if stride:
        prediction = prediction.contiguous()
    shape = signs_shape(prediction.shape, image.shape[1], stride) if keep_signs else [0]
    signs = native.empty(shape, torch.int32)
    total, hidden_cells = native.extension.masked_l1_loss_forward(
        prediction.data_ptr(),
        () if stride else prediction.stride(),
        native.DTYPE_CODES[prediction.dtype],
        0,  # no list of rows: every cell has its prediction
        *image_arguments(image, mask, mean, std),
        stride,
        norm_target,
        signs.data_ptr() if keep_signs else 0,
        torch.get_num_threads(),
    )
    per_pixel = gradient_per_pixel(image, mask, hidden_cells)
    return torch.tensor(total * per_pixel), torch.tensor(per_pixel), signs


def gradient_per_pixel(image: Tensor, mask: Tensor, hidden_cells: int) -> float:
    """1 / (ΣM + 1e-5) / C, with M the mask at the image's resolution."""
    pixels = (image.shape[2] // mask.shape[1]) * (image.shape[3] // mask.shape[2])
    return 1.0 / (hidden_cells * pixels + 1e-5) / image.shape[1]


def image_arguments(
    image: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None
) -> tuple[object, ...]:
    """What every native loss needs of the target, in the order of its arguments."""
    return (
        image.data_ptr(),
        tuple(image.shape),
        tuple(image.stride()),
        native.DTYPE_CODES[image.dtype],
        [] if mean is None else mean.tolist(),
        [] if std is None else std.tolist(),
        mask.data_ptr(),
        tuple(mask.shape[1:]),
    )


def backward(
    grad_out: Tensor, per_pixel: Tensor, signs: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Signs times both scalars in the layout of the prediction."""
    assert native.extension is not None
    grad = native.empty(shape, dtype)
    runs = signs.numel() // signs.shape[-1] if signs.numel() else 0
    # a few runs to a row: whole cache lines, and rows enough to share among threads
    runs_per_row = math.gcd(runs, 64)
    native.extension.expand_signs(
        signs.data_ptr(),
        0,  # no list of rows: all of them
        grad.data_ptr(),
        native.DTYPE_CODES[dtype],
        runs // max(runs_per_row, 1),
        runs_per_row,
        grad.numel() // max(runs, 1),
        float(grad_out * per_pixel),
        torch.get_num_threads(),
    )
    return grad
