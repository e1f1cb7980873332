"""What merging of patches takes, and what it keeps for its backward.

C width of a token, M width of the output, T rows of four tokens.
"""

from typing import NamedTuple

from torch import Tensor


class MergeParameters(NamedTuple):
    """Parameters of the merging, or their gradients.

    Attributes:
        norm_weight: [4C], with norm_bias the affine part of the LayerNorm; float32.
        norm_bias: [4C].
        weight: [M, 4C], in the dtype of the product.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor


class Statistics(NamedTuple):
    """Mean and reciprocal deviation of every row of four tokens, float32 [T]."""

    mean: Tensor
    rstd: Tensor
