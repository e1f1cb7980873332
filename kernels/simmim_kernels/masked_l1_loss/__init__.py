"""The SimMIM loss: mean absolute error of the reconstruction over the hidden pixels only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, wrong_input
from simmim_kernels.masked_l1_loss import reference
from simmim_kernels.masked_l1_loss.arguments import Loss, PerChannel, Target, loss_shapes
from simmim_kernels.op import AnyStrides, Op

__all__ = ["BACKENDS", "check_target", "masked_l1_loss", "masked_l1_loss_from_tokens"]


def masked_l1_loss(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    norm_target: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean absolute error over the hidden pixels only.

    Args:
        prediction: [B, C, H, W]; float32, bfloat16 or float16; any strides.
        image: same shape and device. Floating point: normalised pixels. uint8: 0–255, normalised
            here with `mean` and `std`. Any strides.
        mask: bool [B, H // patch_size, W // patch_size]; True marks a hidden cell.
        patch_size: pixels per side of a mask cell; divides H and W.
        mean: per channel, on the 0–1 scale; goes with a uint8 `image` and with no other.
        std: per channel, on the 0–1 scale; likewise.
        norm_target: odd side in pixels of the sliding window over which the target is normalised
            (47 as published for SwinV2); None leaves the target as it is.
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    Returns:
        Scalar float32 in normalised-pixel units, accumulated in float32; 0 when nothing is
        hidden. Gradient (first order) flows to `prediction` only. Non-finite values under visible
        pixels reach neither the loss nor the gradient (with `norm_target` the target at a hidden
        pixel mixes its visible neighbours, so there they do).

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/simmim.py (the 1e-5 in the denominator included);
        microsoft/Swin-Transformer models/simmim.py norm_targets.
    """
    error = wrong_input(prediction=prediction, image=image, mask=mask, patch_size=patch_size)

    if prediction.dim() != 4 or image.shape != prediction.shape:
        raise error("prediction and image must both be [B, C, H, W]")
    B, _, H, W = prediction.shape
    if patch_size < 1 or H % patch_size or W % patch_size:
        raise error("patch_size must divide H and W")
    if mask.shape != (B, H // patch_size, W // patch_size):
        raise error("mask must be bool [B, H // patch_size, W // patch_size]")
    return _loss(prediction, image, mask, 0, mean, std, norm_target, backend, error)


def masked_l1_loss_from_tokens(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    stride: int,
    *,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    norm_target: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`masked_l1_loss` of a prediction that is still in tokens: never shuffled into an image.

    Args:
        prediction: [B, h, w, C·stride·stride], in the order that PixelShuffle(stride) undoes;
            float32, bfloat16 or float16. Fastest when contiguous (a channels-last 1×1 convolution
            followed by `.permute(0, 2, 3, 1)` is); otherwise it is copied.
        image: [B, C, h·stride, w·stride], as for `masked_l1_loss`. Any strides.
        mask: bool [B, gh, gw], any grid whose cells divide the image; True marks a hidden cell.
        stride: pixels per side of a predicted cell.
        mean: as for `masked_l1_loss`.
        std: as for `masked_l1_loss`.
        norm_target: as for `masked_l1_loss`.
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    Returns:
        Scalar float32, that of `masked_l1_loss` on the shuffled prediction. Gradient flows to
        `prediction` only.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/simmim.py (decoder and loss).
    """
    error = wrong_input(prediction=prediction, image=image, mask=mask, stride=stride)

    if prediction.dim() != 4 or image.dim() != 4:
        raise error("expected prediction [B, h, w, C·stride·stride] and image [B, C, H, W]")
    B, h, w, width = prediction.shape
    if stride < 1 or image.shape != (B, image.shape[1], h * stride, w * stride):
        raise error("image must be [B, C, h·stride, w·stride]")
    if width != image.shape[1] * stride**2:
        raise error("prediction must be [B, h, w, C·stride·stride]")
    return _loss(prediction, image, mask, stride, mean, std, norm_target, backend, error)


def check_target(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    mean: PerChannel | None,
    std: PerChannel | None,
    norm_target: int | None,
    error: Callable[[str], ValueError],
) -> tuple[Tensor | None, Tensor | None]:
    """Checks what the losses share; mean and std as float32 [C], or None for a float image.

    Raises:
        ValueError: as the public losses state; `error` makes it from what is wrong.
    """
    B, _, H, W = image.shape
    if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[0] != B:
        raise error("mask must be bool [B, gh, gw]")
    if 0 in mask.shape[1:] or H % mask.shape[1] or W % mask.shape[2]:
        raise error("the mask's grid must divide the image into whole cells")
    if not (prediction.device == image.device == mask.device):
        raise error("all tensors must be on one device")
    if not prediction.dtype.is_floating_point:
        raise error("prediction must be floating point")
    if norm_target is not None and (norm_target < 3 or norm_target % 2 == 0):
        raise ValueError(f"norm_target={norm_target} must be odd and at least 3")
    return check_pixels(image, mean, std, error)


def check_pixels(
    image: Tensor,
    mean: PerChannel | None,
    std: PerChannel | None,
    error: Callable[[str], ValueError],
) -> tuple[Tensor | None, Tensor | None]:
    """mean and std of a uint8 image as float32 [C]; None for a floating point one.

    Raises:
        ValueError: mean and std come without a uint8 image or it without them, or are not [C].
    """
    if image.dtype.is_floating_point:
        if mean is not None or std is not None:
            raise error(
                "mean and std go with a uint8 image; a floating point one is taken as normalised"
            )
        return None, None
    if mean is None or std is None or image.dtype != torch.uint8:
        raise error("image must be floating point, or uint8 with mean and std")
    mean = torch.as_tensor(mean, dtype=torch.float32, device=image.device)
    std = torch.as_tensor(std, dtype=torch.float32, device=image.device)
    if mean.shape != image.shape[1:2] or std.shape != image.shape[1:2]:
        raise error("mean and std need one value per channel")
    return mean, std


def _loss(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    stride: int,
    mean: PerChannel | None,
    std: PerChannel | None,
    norm_target: int | None,
    backend: str | None,
    error: Callable[[str], ValueError],
) -> Tensor:
    """Checks what both layouts share, and runs their op or its reference."""
    mean, std = check_target(prediction, image, mask, mean, std, norm_target, error)
    chosen = choose("masked_l1_loss", BACKENDS, (prediction, image, mask), backend)
    if chosen == "reference":
        if mean is not None and std is not None:
            image = reference.normalise_pixels(image, mean, std)
        if stride:
            prediction = reference.shuffle_pixels(prediction, stride)
        return reference.masked_l1_loss(prediction, image.detach(), mask, norm_target)
    keep_signs = prediction.requires_grad and torch.is_grad_enabled()
    target = Target(image.detach(), mask, mean, std, stride, norm_target or 0)
    return _op(chosen, prediction, target, keep_signs).loss


def _shapes(prediction: AnyStrides, target: Target, keep_signs: bool) -> Loss:
    return loss_shapes(prediction, target, keep_signs)


def _gradient_shapes(
    grad_out: Tensor, per_pixel: Tensor, signs: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    return grad_out.new_empty(shape, dtype=dtype)


def _context(prediction: Tensor, **unused: Any) -> dict[str, Any]:
    """Keeps what the prediction is like and not the prediction."""
    return {"shape": prediction.shape, "dtype": prediction.dtype}


_op = Op("masked_l1_loss", _shapes, _gradient_shapes, gradients=("prediction",), context=_context)
