"""Calls the C++ kernels of masked_l1_loss with the addresses of tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.masked_l1_loss.arguments import Loss, Target, signs_shape


def forward(prediction: Tensor, target: Target, keep_signs: bool) -> Loss:
    """The loss and what its gradient needs."""
    assert native.extension is not None
    if target.stride:
        prediction = prediction.contiguous()
    signs = native.empty(signs_shape(prediction.shape, target, keep_signs), torch.int32)
    total, hidden_cells = native.extension.masked_l1_loss_forward(
        prediction.data_ptr(),
        () if target.stride else prediction.stride(),
        native.DTYPE_CODES[prediction.dtype],
        0,  # no list of rows: every cell has its prediction
        *target_arguments(target),
        signs.data_ptr() if keep_signs else 0,
        torch.get_num_threads(),
    )
    return loss_of_sum(total, hidden_cells, target, signs)


def loss_of_sum(total: float, hidden_cells: int, target: Target, signs: Tensor) -> Loss:
    """The sum of errors over C · (ΣM + 1e-5), with M the mask at the image's resolution."""
    _, C, H, W = target.image.shape
    pixels = (H // target.mask.shape[1]) * (W // target.mask.shape[2])
    per_pixel = 1.0 / (hidden_cells * pixels + 1e-5) / C
    return Loss(torch.tensor(total * per_pixel), torch.tensor(per_pixel), signs)


def target_arguments(target: Target) -> tuple[object, ...]:
    """What the native kernel takes of the target, in the order of its arguments."""
    image, mask, mean, std, stride, norm_target = target
    return (
        image.data_ptr(),
        tuple(image.shape),
        tuple(image.stride()),
        native.DTYPE_CODES[image.dtype],
        [] if mean is None else mean.tolist(),
        [] if std is None else std.tolist(),
        mask.data_ptr(),
        tuple(mask.shape[1:]),
        stride,
        norm_target,
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
