"""What the embedding of patches takes, and what it keeps for its backward.

B batch, C channels, H W pixels, p side of a patch, h w grid of patches, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from simmim_kernels.op import AnyStrides


class Patches(NamedTuple):
    """Images that are cut into patches.

    Attributes:
        image: [B, C, H, W], bytes with mean and std or normalised pixels.
        mask: bool [B, h, w], True hides; None hides nothing.
        mean: [C] in float32, of bytes.
        std: [C], with mean.
    """

    image: AnyStrides
    mask: Tensor | None
    mean: Tensor | None
    std: Tensor | None


class EmbeddingParameters(NamedTuple):
    """Parameters of the embedding, or their gradients.

    Attributes:
        weight: [D, C, p, p], in the dtype of the product; all others are [D] in float32.
        bias: of the projection.
        norm_weight: of the LayerNorm after the projection, if there is one.
        norm_bias: with norm_weight.
        mask_token: in the place of hidden patches.
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mask_token: Tensor | None


class Embedded(NamedTuple):
    """Tokens, and what the backward of a norm needs of visible patches; [0] each without one.

    Attributes:
        out: tokens [B, h·w, D].
        projected: [visible, D], the projection without its bias.
        norm_mean: [visible], float32.
        norm_rstd: [visible], reciprocal deviations, float32.
    """

    out: Tensor
    projected: Tensor
    norm_mean: Tensor
    norm_rstd: Tensor


def num_tokens(image: Tensor, weight: Tensor) -> int:
    """Patches of an image, h·w."""
    patch = weight.shape[2]
    return (image.shape[2] // patch) * (image.shape[3] // patch)


def embedded_shapes(
    image: Tensor, parameters: EmbeddingParameters, dtype: torch.dtype, visible: int
) -> Embedded:
    """Outputs without values, in that dtype, with room for that many visible patches."""
    weight = parameters.weight
    rows = 0 if parameters.norm_weight is None else visible
    per_row = weight.new_empty((rows,), dtype=torch.float32)
    D = weight.shape[0]
    shapes = (image.shape[0], num_tokens(image, weight), D), (rows, D)
    out, projected = (weight.new_empty(shape, dtype=dtype) for shape in shapes)
    return Embedded(out, projected, per_row, torch.empty_like(per_row))
