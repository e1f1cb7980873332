"""Batch norm by the statistics of the batch, a residual that is added, and ReLU.

B batch, C channels, N values of a channel in the batch.
"""

from typing import Any

import torch
from torch import Tensor

from simmim_kernels.batch_norm_relu import native_kernel, reference
from simmim_kernels.dispatch import (
    Backend,
    choose,
    describe,
    implementation,
    never,
    no_second_order,
)

__all__ = ["BACKENDS", "batch_norm_relu"]

BACKENDS = (
    Backend("native", native_kernel.reasons_against),
    Backend("reference", never),
)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(batch_norm(x) + residual), as a network in training normalises.

    Of the two maps between (the normalised one, the sum) neither is written. For the backward it
    keeps x and two numbers per channel, and beside a residual the output: without one the sign of
    the normalised values is computed again.

    Args:
        x: [B, C, …]; float32, bfloat16 or float16. "native" takes maps in channels-last order.
        weight: [C]; with bias [C] the affine part of the norm, of x's dtype or float32.
        bias: [C].
        residual: like x, or None.
        eps: of the norm.
        backend: "native" (CPU) or "reference"; None takes the first that can run.

    Returns:
        The output, like x; and mean and biased variance of every channel, float32 [C] (float64 of
        a float64 x), from which running statistics are kept. First-order gradients flow to x,
        weight, bias and residual, none through mean and variance.

    Raises:
        ValueError: shapes or dtypes disagree, or x holds no value; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: torch.nn.functional.batch_norm with training=True, which keeps 1 − momentum of the old
    running statistics and takes the unbiased variance for them.
    """

    def error(what: str) -> ValueError:
        return ValueError(f"{what}: {describe(x=x, weight=weight, bias=bias, residual=residual)}")

    if x.dim() < 2 or not x.numel():
        raise error("expected x [B, C, …] with values")
    if weight.shape != (x.shape[1],) or bias.shape != weight.shape:
        raise error("expected weight [C] and bias [C]")
    if not x.dtype.is_floating_point:
        raise error("expected floating point maps")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise error("expected a residual like x")
    for tensor in (weight, bias, residual):
        if tensor is not None and tensor.device != x.device:
            raise error("expected tensors of one device")
    if any(t.dtype not in (x.dtype, torch.float32) for t in (weight, bias)):
        raise error("expected weight and bias of x's dtype or float32")
    chosen = choose("batch_norm_relu", BACKENDS, (x, residual, weight, bias), backend)
    if chosen == "reference":
        return reference.batch_norm_relu(x, weight, bias, residual, eps)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.simmim.batch_norm_relu(
        x, weight.float(), bias.float(), residual, eps, chosen
    )
    return found


# Maps [B, C, …] in channels-last order, also those that come out; vectors are float32.
torch.library.define(
    "simmim::batch_norm_relu",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
# `out` only where there was a residual; the gradient of one is [0] without.
torch.library.define(
    "simmim::batch_norm_relu_backward",
    "(Tensor grad_out, Tensor x, Tensor? out, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor variance, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("simmim::batch_norm_relu", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, eps, backend = arguments
    kernel = implementation("batch_norm_relu", backend)
    found: tuple[Tensor, Tensor, Tensor] = kernel.forward(*map(_in_order, tensors), eps)
    return found


@torch.library.impl("simmim::batch_norm_relu_backward", "CompositeExplicitAutograd")
def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, eps, backend = arguments
    kernel = implementation("batch_norm_relu", backend)
    grads: tuple[Tensor, ...] = kernel.backward(*map(_in_order, tensors), eps)
    return grads


def _in_order(tensor: Tensor | None) -> Tensor | None:
    """A vector contiguous, a map in channels-last order."""
    if tensor is None or tensor.dim() < 2:
        return None if tensor is None else tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _fake(x: Tensor, weight: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


torch.library.register_fake("simmim::batch_norm_relu", _fake)


def _backward_fake(
    grad_out: Tensor, x: Tensor, out: Tensor | None, weight: Tensor, *unused: Any
) -> tuple[Tensor, ...]:
    of_residual = x.new_empty(0) if out is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), of_residual


torch.library.register_fake("simmim::batch_norm_relu_backward", _backward_fake)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, ctx.eps, ctx.backend = inputs
    out, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, None if residual is None else out, weight, bias, *statistics)


def _backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor one time only
    found = torch.ops.simmim.batch_norm_relu_backward(grad_out, *saved, ctx.eps, ctx.backend)
    wanted = ctx.needs_input_grad[:4]
    return *(g if w else None for g, w in zip(found, wanted)), None, None


torch.library.register_autograd("simmim::batch_norm_relu", _backward, setup_context=_context)
torch.library.register_autograd("simmim::batch_norm_relu_backward", no_second_order)
