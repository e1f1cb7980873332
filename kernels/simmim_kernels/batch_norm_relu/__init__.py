"""Batch norm by the statistics of the batch, a residual that is added, and ReLU.

B batch, C channels, N values of a channel in the batch.
"""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from simmim_kernels.batch_norm_relu import native_kernel, reference
from simmim_kernels.dispatch import Backend, choose, describe, never
from simmim_kernels.op import Op

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
    return _normalise(chosen, x, weight.float(), bias.float(), residual, eps)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


Map = Annotated[Tensor, _channels_last]
OptionalMap = Annotated[Tensor | None, _channels_last]


class Normalised(NamedTuple):
    """The output, in channels-last order, and mean and biased variance of every channel."""

    out: Tensor
    mean: Tensor
    variance: Tensor


def _shapes(x: Map, weight: Tensor, bias: Tensor, residual: OptionalMap, eps: float) -> Normalised:
    """Vectors are float32."""
    return Normalised(torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight))


def _gradient_shapes(
    grad_out: Map,
    x: Map,
    out: OptionalMap,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_residual = x.new_empty(0) if out is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), of_residual


def _context(out: Tensor, residual: Tensor | None, **unused: Any) -> dict[str, Any]:
    """Keeps the output beside a residual only: its sign is computed again without one."""
    return {"out": None if residual is None else out}


_normalise = Op(
    "batch_norm_relu",
    _shapes,
    _gradient_shapes,
    gradients=("x", "weight", "bias", "residual"),
    context=_context,
    all_outputs=True,
)
