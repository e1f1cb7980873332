"""Patch embedding in plain PyTorch: every patch, hidden or not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.masked_l1_loss.reference import normalise_pixels


def project_patches(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    eps: float,
) -> Tensor:
    """image [B, C, H, W], weight [D, C, p, p] → [B, h·w, D], normalised if there is a norm."""
    if mean is not None and std is not None:
        image = normalise_pixels(image, mean, std)
    if not torch.is_autocast_enabled(image.device.type):
        image = image.to(weight.dtype)
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if norm_weight is None:
        return tokens
    return F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
