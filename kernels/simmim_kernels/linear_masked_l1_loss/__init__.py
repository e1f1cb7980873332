"""Linear head and masked L1 loss in one: only cells with a hidden pixel are projected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simmim_kernels.dispatch import (
    BACKENDS,
    choose,
    describe,
    implementation,
    no_second_order,
)
from simmim_kernels.dtypes import autocast, check_dtypes, of_reference, product_dtype
from simmim_kernels.linear_masked_l1_loss import reference
from simmim_kernels.masked_l1_loss import check_target
from simmim_kernels.masked_l1_loss.reference import normalise_pixels
from simmim_kernels.masked_l1_loss.signs import signs_shape

__all__ = ["BACKENDS", "linear_masked_l1_loss"]


def linear_masked_l1_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    mask: Tensor,
    stride: int,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
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

    def error(what: str) -> ValueError:
        given = describe(
            features=features, weight=weight, bias=bias, image=image, mask=mask, stride=stride
        )
        return ValueError(f"{what}: {given}")

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
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (features, weight, bias)
    )
    dtype = product_dtype(chosen, features.dtype)
    loss: Tensor = torch.ops.simmim.linear_masked_l1_loss(
        features,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        image.detach(),
        mask,
        mean,
        std,
        stride,
        norm_target or 0,
        needs_gradient,
        chosen,
    )[0]
    return loss


# Outputs as of simmim::masked_l1_loss; sign words of cells that are not projected are 0.
torch.library.define(
    "simmim::linear_masked_l1_loss",
    "(Tensor features, Tensor weight, Tensor? bias, Tensor image, Tensor mask, Tensor? mean, "
    "Tensor? std, SymInt stride, SymInt norm_target, bool keep_signs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
# Gradients of features, weight and bias; [0] where it is not wanted.
torch.library.define(
    "simmim::linear_masked_l1_loss_backward",
    "(Tensor step, Tensor signs, Tensor features, Tensor weight, Tensor mask, SymInt stride, "
    "bool of_features, bool of_weight, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("simmim::linear_masked_l1_loss", "CompositeExplicitAutograd")
def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    stride: int,
    norm_target: int,
    keep_signs: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("linear_masked_l1_loss", backend)
    found: tuple[Tensor, Tensor, Tensor] = kernel.forward(
        features.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        image,
        mask.contiguous(),
        mean,
        std,
        stride,
        norm_target,
        keep_signs,
    )
    return found


@torch.library.impl("simmim::linear_masked_l1_loss_backward", "CompositeExplicitAutograd")
def _backward_kernel(
    step: Tensor,
    signs: Tensor,
    features: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: int,
    of_features: bool,
    of_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = implementation("linear_masked_l1_loss", backend)
    grads: tuple[Tensor, Tensor, Tensor] = kernel.backward(
        step,
        signs,
        features.contiguous(),
        weight.contiguous(),
        mask.contiguous(),
        stride,
        of_features,
        of_weight,
    )
    return grads


def _forward_fake(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    stride: int,
    norm_target: int,
    keep_signs: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = signs_shape(features.shape, image.shape[1], stride) if keep_signs else [0]
    scalar = features.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), features.new_empty(shape, dtype=torch.int32)


torch.library.register_fake("simmim::linear_masked_l1_loss", _forward_fake)


def _backward_fake(
    step: Tensor,
    signs: Tensor,
    features: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: int,
    of_features: bool,
    of_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        features.new_empty(features.shape if of_features else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,)),
        weight.new_empty(weight.shape[:1] if of_weight else (0,)),
    )


torch.library.register_fake("simmim::linear_masked_l1_loss_backward", _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weight, _, _, mask, _, _, stride, _, _, backend = inputs
    _, per_pixel, signs = output
    ctx.mark_non_differentiable(per_pixel, signs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(per_pixel, signs, features, weight, mask)
    ctx.stride, ctx.backend = stride, backend


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    per_pixel, signs, features, weight, mask = ctx.saved_tensors
    of_features, of_weight, of_bias = ctx.needs_input_grad[:3]
    found = torch.ops.simmim.linear_masked_l1_loss_backward(
        grad_loss * per_pixel,
        signs,
        features,
        weight,
        mask,
        ctx.stride,
        of_features,
        of_weight or of_bias,
        ctx.backend,
    )
    wanted = (of_features, of_weight, of_bias)
    return *(g if needed else None for g, needed in zip(found, wanted)), *(None,) * 8


torch.library.register_autograd(
    "simmim::linear_masked_l1_loss", _backward, setup_context=_setup_context
)
torch.library.register_autograd("simmim::linear_masked_l1_loss_backward", no_second_order)
