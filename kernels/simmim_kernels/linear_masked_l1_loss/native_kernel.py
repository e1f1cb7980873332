"""The head as matrix products of a few images at a time, the loss as the C++ kernel on their rows.

The gradient of the loss is ±1 times one number, so both backward products have the sign matrix as
a factor; it is rebuilt from the sign words a few images at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.linear_masked_l1_loss.reference import hidden_cells
from simmim_kernels.masked_l1_loss.arguments import Loss, Target, signs_shape
from simmim_kernels.masked_l1_loss.native_kernel import loss_of_sum, target_arguments

# Predictions that exist at one time: enough rows to keep the matrix product efficient.
ROWS_AT_ONCE = 512


def _chunks(cells: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First and last image of a chunk, and the flat indices of its hidden cells."""
    per_image = cells.flatten(1).sum(1).tolist()
    first, rows = 0, 0
    for image, count in enumerate(per_image):
        if rows and rows + count > ROWS_AT_ONCE:
            yield first, image, _rows(cells, first, image)
            first, rows = image, 0
        rows += count
    if rows:
        yield first, len(per_image), _rows(cells, first, len(per_image))


def _rows(cells: Tensor, first: int, last: int) -> Tensor:
    within = cells[first:last].flatten().nonzero().squeeze(1)
    return within + first * cells[0].numel()


def forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Target, keep_signs: bool
) -> Loss:
    """The loss and what its gradient needs."""
    assert native.extension is not None
    B, h, w, D = features.shape
    cells = hidden_cells(target.mask, (h, w), target.stride)
    flat = features.view(-1, D)
    dtype, transposed = weight.dtype, weight.t()
    signs = torch.zeros(signs_shape(features.shape, target, keep_signs), dtype=torch.int32)
    total, num_hidden = 0.0, 0
    for first, last, rows in _chunks(cells):
        chunk = flat[rows].to(dtype)
        with torch.autocast("cpu", enabled=False):  # it would take the products back to 16 bits
            prediction = (
                chunk @ transposed if bias is None else torch.addmm(bias, chunk, transposed)
            )
        # rounded as a head in the features' own dtype rounds it
        prediction = prediction.to(features.dtype)
        row_of_cell = torch.zeros(B * h * w, dtype=torch.int32)
        row_of_cell[rows] = torch.arange(len(rows), dtype=torch.int32)
        row_of_cell = row_of_cell[first * h * w : last * h * w]
        images = slice(first, last)
        part = target._replace(image=target.image[images], mask=target.mask[images])
        part_total, count = native.extension.masked_l1_loss_forward(
            prediction.data_ptr(),
            (),
            native.DTYPE_CODES[prediction.dtype],
            row_of_cell.data_ptr(),
            *target_arguments(part),
            signs[images].data_ptr() if keep_signs else 0,
            torch.get_num_threads(),
        )
        total, num_hidden = total + part_total, num_hidden + count
    return loss_of_sum(total, num_hidden, target, signs)


def backward(
    grad_out: Tensor,
    per_pixel: Tensor,
    signs: Tensor,
    features: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: int,
    of_features: bool,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias; [0] where it is not wanted."""
    assert native.extension is not None
    _, h, w, D = features.shape
    outputs = weight.shape[0]
    dtype = weight.dtype
    value = float(grad_out * per_pixel)
    flat = features.view(-1, D)
    grad_features = torch.zeros_like(features) if of_features else features.new_empty(0)
    total_weight = native.empty((outputs, D), torch.float32).zero_() if of_parameters else None
    total_bias = torch.zeros(outputs) if of_parameters else None
    for _, _, rows in _chunks(hidden_cells(mask, (h, w), stride)):
        sign = torch.empty(len(rows), outputs, dtype=dtype)
        native.extension.expand_signs(
            signs.data_ptr(),
            rows.data_ptr(),
            sign.data_ptr(),
            native.DTYPE_CODES[dtype],
            len(rows),
            signs.shape[3],
            stride,
            1.0,
            torch.get_num_threads(),
        )
        if of_features:
            product = (sign @ weight).float().mul_(value)
            grad_features.view(-1, D)[rows] = product.to(features.dtype)
        if total_weight is not None and total_bias is not None:
            if dtype == torch.float32:
                total_weight.addmm_(sign.t(), flat[rows].to(dtype), alpha=value)
            else:
                total_weight.add_(sign.t() @ flat[rows], alpha=value)
            total_bias += sign.sum(0, dtype=torch.float32)
    if total_weight is None or total_bias is None:
        return grad_features, weight.new_empty(0), weight.new_empty(0)
    return grad_features, total_weight.to(dtype), total_bias.mul_(value).to(dtype)
