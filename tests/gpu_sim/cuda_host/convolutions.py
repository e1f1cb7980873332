"""Convolutions over the stand-in: one launch each way, as cuDNN's take at least.

cuDNN brings a CUDA runtime of its own, which finds no GPU; without it torch would launch a copy and
a product for every image, which no GPU sees.
"""

from typing import Any

import torch
from torch import Tensor


def install() -> torch.library.Library:
    """Replace torch's convolutions on CUDA; they come back when what is returned is deleted."""
    torch.backends.cudnn.enabled = False
    # torch.compile asks which layout to expect
    torch._C._conv_determine_backend_memory_format = lambda x, weight, _: _layout(x, weight)
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("convolution", _forward)
    library.impl("convolution_backward", _backward)
    return library


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    if transposed:
        raise NotImplementedError("the stand-in has no transposed convolutions")
    sides = [
        (side + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i, side in enumerate(x.shape[2:])
    ]
    shape = (x.shape[0], weight.shape[0], *sides)
    made = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, weight))
    out = made.zero_()
    return out if bias is None else out.add_(bias.view(1, -1, 1, 1))


def _backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias = rest[-1]
    layout = _layout(x, weight)
    return (
        torch.empty_like(x, memory_format=layout).zero_() if of_x else None,
        torch.empty_like(weight, memory_format=layout).zero_() if of_weight else None,
        grad_out.sum((0, 2, 3)) if of_bias else None,
    )


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """That of cuDNN's results: channels-last where the image or the weight is."""
    last = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format
