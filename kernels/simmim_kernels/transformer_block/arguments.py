"""What the ops of a transformer block take, and what they keep for their backward.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, S tokens of a
window, T = B·H·W tokens. Launchers get matrices in the dtype of the products and everything else of
the parameters in float32; what is kept has the dtype of x where nothing else is said.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionParameters(NamedTuple):
    """Parameters of an attention branch, or their gradients.

    Attributes:
        norm_weight: [C], with norm_bias the affine part of the LayerNorm.
        norm_bias: [C].
        qkv_weight: [3C, C].
        qkv_bias: [3C].
        factors: [N], those of cosines; None for products of q and k.
        bias: [N, S, S], of every pair of positions.
        proj_weight: [C, C].
        proj_bias: [C].
        gamma: [C], LayerScale; None is 1.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    factors: Tensor | None
    bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor
    gamma: Tensor | None


class MlpParameters(NamedTuple):
    """Parameters of an MLP branch, or their gradients.

    Attributes:
        norm_weight: [C], with norm_bias the affine part of the LayerNorm.
        norm_bias: [C].
        fc1_weight: [M, C].
        fc1_bias: [M].
        fc2_weight: [C, M].
        fc2_bias: [C].
        gamma: [C], LayerScale; None is 1.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    gamma: Tensor | None


class Attended(NamedTuple):
    """What attention has read and left.

    Attributes:
        qkv: [B, H, W, 3C], from the native kernels without its bias.
        attended: [B, H, W, C].
        log_sums: those of `window_attention`, float32 [B, H, W, N].
    """

    qkv: Tensor
    attended: Tensor
    log_sums: Tensor


class Statistics(NamedTuple):
    """Mean and reciprocal deviation of every token that was normalised, float32 [T]."""

    mean: Tensor
    rstd: Tensor


class NormalisedBranch(NamedTuple):
    """What was normalised, [T, C] without its bias, and its `Statistics`."""

    branch: Tensor
    mean: Tensor
    rstd: Tensor


def statistics_of(x: Tensor) -> Statistics:
    """Those of the tokens of x, without values."""
    mean = x.new_empty((x.numel() // x.shape[-1],), dtype=torch.float32)
    return Statistics(mean, torch.empty_like(mean))


def check_vectors(
    x: Tensor,
    parameters: AttentionParameters | MlpParameters,
    last_bias: Tensor,
    branch_scale: Tensor | None,
    error: Callable[[str], ValueError],
) -> None:
    """Raises `error` unless what is added or multiplied along C, or by image, is of that length."""
    vectors = (last_bias, parameters.gamma, parameters.norm_weight, parameters.norm_bias)
    if any(v is not None and v.shape != x.shape[-1:] for v in vectors):
        raise error("the last bias, gamma if there is one, norm_weight and norm_bias must be [C]")
    if branch_scale is not None and branch_scale.shape != x.shape[:1]:
        raise error("expected branch_scale [B]")
