"""Parts that the published SimMIM adds to an encoder: mask token, head and loss.

B batch, C channels, H W pixels, h w mask grid, D width.
Source: microsoft/SimMIM models/simmim.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.build import Spec


def published_loss(prediction: Tensor, image: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over the hidden pixels, computed on whole images as published.

    Args:
        prediction: [B, C, H, W].
        image: [B, C, H, W], normalised.
        mask: bool [B, h, w].
        patch_size: pixels of a cell of the mask.
    """
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    pixels = pixels.unsqueeze(1).contiguous()  # [B, 1, H, W]
    error = F.l1_loss(image, prediction, reduction="none")
    return (error * pixels).sum() / (pixels.sum() + 1e-5) / image.shape[1]


def published_head(spec: Spec, width: int) -> nn.Sequential:
    """1×1 convolution and pixel shuffle, [B, D, h, w] → [B, C, H, W]."""
    return nn.Sequential(
        nn.Conv2d(width, spec.channels * spec.stride**2, 1), nn.PixelShuffle(spec.stride)
    )


def blend(tokens: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """Replace hidden tokens [B, …, D] by the mask token; mask bool [B, …]."""
    weight = mask.unsqueeze(-1).type_as(mask_token)
    return tokens * (1.0 - weight) + mask_token * weight
