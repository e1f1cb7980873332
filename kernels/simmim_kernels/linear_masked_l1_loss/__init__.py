"""Linear head and masked L1 loss in one: only cells with a hidden pixel are projected."""

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, wrong_input
from simmim_kernels.dtypes import autocast, check_dtypes, of_reference, product_dtype
from simmim_kernels.linear_masked_l1_loss import reference
from simmim_kernels.masked_l1_loss import check_target
from simmim_kernels.masked_l1_loss.arguments import Loss, PerChannel, Target, loss_shapes
from simmim_kernels.masked_l1_loss.reference import normalise_pixels
from simmim_kernels.op import Op

__all__ = ["BACKENDS", "linear_masked_l1_loss"]


def linear_masked_l1_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    mask: Tensor,
    stride: int,
    *,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    norm_target: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`masked_l1_loss_from_tokens` of a linear head's output, without keeping that output.

    Args:
        features: [B, h, w, D]; float32, bfloat16 or float16. An encoder's [B, D, h, w] goes in as
            `.permute(0, 2, 3, 1)`. Any strides.
        weight: [C·stride·stride, D], or the [C·stride·stride, D, 1, 1] of a 1×1 convolution.
        bias: [C·stride·stride] or None.
        image: [B, C, h·stride, w·stride], as for `masked_l1_loss`. Any strides.
        mask: bool [B, gh, gw], any grid whose cells divide the image; True marks a hidden cell.
        stride: pixels per side of a predicted cell; a cell is projected when any of its pixels is
            hidden.
        mean: as for `masked_l1_loss`.
        std: as for `masked_l1_loss`.
        norm_target: as for `masked_l1_loss`.
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    weight and bias have the dtype of features or are float32. Under autocast features are cast to
    its dtype; products run in that of features, in float32 where the native backend's processor
    has no fast 16-bit products.

    Returns:
        Scalar float32, that of `masked_l1_loss`. Gradient (first order) flows to features, weight
        and bias only; cells that are not projected give and get none, whatever they hold.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/simmim.py (decoder and loss); the fusion of head and loss
        follows linkedin/Liger-Kernel's fused linear cross entropy in what it saves.
    """
    error = wrong_input(
        features=features, weight=weight, bias=bias, image=image, mask=mask, stride=stride
    )

    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    if features.dim() != 4 or weight.dim() != 2 or image.dim() != 4:
        raise error(
            "expected features [B, h, w, D], weight [C·stride·stride, D] and image [B, C, H, W]"
        )
    B, h, w, D = features.shape
    if stride < 1 or image.shape != (B, image.shape[1], h * stride, w * stride):
        raise error("image must be [B, C, h·stride, w·stride]")
    outputs = image.shape[1] * stride**2
    if weight.shape != (outputs, D) or (bias is not None and bias.shape != (outputs,)):
        raise error("weight must be [C·stride·stride, D], bias [C·stride·stride]")
    features = autocast(features)
    check_dtypes(features, (weight, bias), error)
    mean, std = check_target(features, image, mask, mean, std, norm_target, error)
    inputs = (features, weight, bias, image, mask)
    chosen = choose("linear_masked_l1_loss", BACKENDS, inputs, backend)
    if chosen == "reference":
        if mean is not None and std is not None:
            image = normalise_pixels(image, mean, std)
        weight, bias = of_reference(features, (weight, bias))
        return reference.linear_masked_l1_loss(
            features, weight, bias, image.detach(), mask, stride, norm_target
        )
    keep_signs = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (features, weight, bias)
    )
    dtype = product_dtype(chosen, features.dtype)
    return _loss(
        chosen,
        features,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        Target(image.detach(), mask, mean, std, stride, norm_target or 0),
        keep_signs,
    ).loss


def _shapes(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    keep_signs: bool,
) -> Loss:
    """Sign words of cells that are not projected are 0."""
    return loss_shapes(features, target, keep_signs)


def _gradient_shapes(
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
    return (
        features.new_empty(features.shape if of_features else (0,)),
        weight.new_empty(weight.shape if of_parameters else (0,)),
        weight.new_empty(weight.shape[:1] if of_parameters else (0,)),
    )


_loss = Op(
    "linear_masked_l1_loss",
    _shapes,
    _gradient_shapes,
    gradients=("features", "weight", "bias"),
)
