"""What the losses of hidden pixels take beside a prediction, and what they keep."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from simmim_kernels.op import AnyStrides

# Numbers of every channel, as a sequence or as [C].
PerChannel = Sequence[float] | Tensor


class Target(NamedTuple):
    """What is predicted, and where.

    Attributes:
        image: [B, C, H, W], bytes with mean and std or normalised pixels.
        mask: bool [B, gh, gw], cells of any size that divide the image; True hides.
        mean: [C] in float32, of bytes.
        std: [C], with mean.
        stride: pixels along a side of a cell of the prediction; 0 where it has an image's layout.
        norm_target: side of the window over which the target is normalised; 0 leaves it.
    """

    image: AnyStrides
    mask: Tensor
    mean: Tensor | None
    std: Tensor | None
    stride: int
    norm_target: int


class Loss(NamedTuple):
    """The loss, and what its gradient needs.

    Attributes:
        loss: float32 scalar.
        per_pixel: float32 scalar, the size of the gradient at a hidden pixel.
        signs: int32, of `signs_shape`, or [0] where they are not kept. A word has 16 pixels of a
            run: bit e where the prediction of pixel e is too high, bit 16 + e where it is too low,
            neither where it is exact, NaN or visible.
    """

    loss: Tensor
    per_pixel: Tensor
    signs: Tensor


def signs_shape(
    prediction_shape: Sequence[int], target: Target, keep_signs: bool = True
) -> list[int]:
    """Shape of the sign words of a prediction: one row per run of pixels, 16 pixels a word.

    The runs are an image's rows (stride 0), or the rows of a cell: [B, h, w, C·stride, words]; of
    features only the cells count. [0] stands for signs that are not kept.
    """
    if not keep_signs:
        return [0]
    if target.stride == 0:
        return [*prediction_shape[:-1], -(-prediction_shape[-1] // 16)]
    return [*prediction_shape[:-1], target.image.shape[1] * target.stride, -(-target.stride // 16)]


def loss_shapes(prediction: Tensor, target: Target, keep_signs: bool) -> Loss:
    """Outputs without values, of a prediction or of the features that one is made from."""
    shape = signs_shape(prediction.shape, target, keep_signs)
    scalar = prediction.new_empty((), dtype=torch.float32)
    signs = prediction.new_empty(shape, dtype=torch.int32)
    return Loss(scalar, torch.empty_like(scalar), signs)
