"""The SimMIM loss: mean absolute error of the reconstruction over the hidden pixels only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simmim_kernels.dispatch import Backend, choose, never
from simmim_kernels.masked_l1_loss import reference

__all__ = ["BACKENDS", "masked_l1_loss"]

BACKENDS = (Backend("reference", never),)


def masked_l1_loss(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    norm_target: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean absolute error over the hidden pixels only.

    Args:
        prediction: [B, C, H, W]; float32, bfloat16 or float16; any strides.
        image: same shape and device. Floating point: normalised pixels. uint8: 0–255, normalised
            here with `mean` and `std`.
        mask: bool [B, H // patch_size, W // patch_size]; True marks a hidden cell.
        patch_size: pixels per side of a mask cell; divides H and W.
        mean: per channel, on the 0–1 scale; needed when `image` is uint8.
        std: per channel, on the 0–1 scale; needed when `image` is uint8.
        norm_target: odd side in pixels of the sliding window over which the target is normalised
            (47 as published for SwinV2); None leaves the target as it is.
        backend: "reference"; None takes the first that can run.

    Returns:
        Scalar float32 in normalised-pixel units, accumulated in float32; 0 when nothing is
        hidden. Gradient flows to `prediction` only. Non-finite values under visible pixels reach
        neither the loss nor the gradient (with `norm_target` the target at a hidden pixel mixes
        its visible neighbours, so there they do).

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.

    Source: microsoft/SimMIM models/simmim.py (the 1e-5 in the denominator included);
        microsoft/Swin-Transformer models/simmim.py norm_targets.
    """
    shapes = (
        f"prediction {tuple(prediction.shape)} {prediction.dtype} {prediction.device}, "
        f"image {tuple(image.shape)} {image.dtype} {image.device}, "
        f"mask {tuple(mask.shape)} {mask.dtype} {mask.device}, patch_size {patch_size}"
    )
    if prediction.dim() != 4 or image.shape != prediction.shape:
        raise ValueError(f"prediction and image must both be [B, C, H, W]: {shapes}")
    B, C, H, W = prediction.shape
    if patch_size < 1 or H % patch_size or W % patch_size:
        raise ValueError(f"patch_size must divide H and W: {shapes}")
    if mask.shape != (B, H // patch_size, W // patch_size) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [B, H // patch_size, W // patch_size]: {shapes}")
    if not (prediction.device == image.device == mask.device):
        raise ValueError(f"all tensors must be on one device: {shapes}")
    if not prediction.dtype.is_floating_point:
        raise ValueError(f"prediction must be floating point: {shapes}")
    if norm_target is not None and (norm_target < 3 or norm_target % 2 == 0):
        raise ValueError(f"norm_target={norm_target} must be odd and at least 3")
    if not image.dtype.is_floating_point:
        if mean is None or std is None or image.dtype != torch.uint8:
            raise ValueError(f"image must be floating point, or uint8 with mean and std: {shapes}")
        mean_t = torch.as_tensor(mean, dtype=torch.float32, device=image.device)
        std_t = torch.as_tensor(std, dtype=torch.float32, device=image.device)
        if mean_t.shape != (C,) or std_t.shape != (C,):
            raise ValueError(f"mean and std need one value per channel: {shapes}")
        image = reference.normalise_pixels(image, mean_t, std_t)
    choose("masked_l1_loss", BACKENDS, (prediction, image, mask), backend)
    return reference.masked_l1_loss(prediction, image.detach(), mask, patch_size, norm_target)
