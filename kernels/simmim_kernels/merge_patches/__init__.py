"""Patch merging: four neighbouring tokens become one, normalised and projected.

B batch, H W token rows and columns, C width, M width of the output, T = B · H/2 · W/2.
"""

from typing import Any

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, describe, implementation, no_second_order
from simmim_kernels.dtypes import autocast, check_dtypes, of_reference, product_dtype
from simmim_kernels.merge_patches import reference

__all__ = ["BACKENDS", "merge_patches"]


def merge_patches(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """linear(layer_norm(the four tokens of each 2 × 2 block, one after the other)).

    The order of the four is the published one: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
    One pass gathers and normalises. For the backward it keeps x and two numbers per output token
    (float32: mean and reciprocal deviation); the normalised rows are computed again.

    Args:
        x: [B, H, W, C], H and W even; float32, bfloat16 or float16.
        norm_weight: [4C], with norm_bias [4C] the affine part of the LayerNorm.
        norm_bias: [4C].
        weight: [M, 4C].
        eps: of the LayerNorm.
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    Under autocast x is cast to its dtype; parameters stay float32 and matrix products run in the
    autocast dtype, on a CPU that only emulates 16-bit products in float32. Without autocast all
    tensors share a dtype, or the vectors are float32.

    Returns:
        [B, H/2, W/2, M], the dtype that x was cast to. Gradient (first order) flows to x and to
        every parameter.

    Raises:
        ValueError: shapes or dtypes disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/swin_transformer.py PatchMerging.
    """

    def error(what: str) -> ValueError:
        given = describe(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight)
        return ValueError(f"{what}: {given}")

    if x.dim() != 4 or x.shape[1] % 2 or x.shape[2] % 2:
        raise error("expected x [B, H, W, C] with H and W even")
    wide = (4 * x.shape[3],)
    if weight.dim() != 2 or weight.shape[1:] != wide:
        raise error("expected weight [M, 4C]")
    if norm_weight.shape != wide or norm_bias.shape != wide:
        raise error("expected norm_weight [4C] and norm_bias [4C]")
    x = autocast(x)
    parameters = (norm_weight, norm_bias, weight)
    check_dtypes(x, parameters, error)
    chosen = choose("merge_patches", BACKENDS, (x, *parameters), backend)
    if chosen == "reference":
        norm_weight, norm_bias, weight = of_reference(x, parameters)
        return reference.merge_patches(x, norm_weight, norm_bias, weight, eps)
    out: Tensor = torch.ops.simmim.merge_patches(
        x,
        norm_weight.float(),
        norm_bias.float(),
        weight.to(product_dtype(chosen, x.dtype)),
        eps,
        chosen,
    )[0]
    return out


# Outputs beyond the result are what the backward needs: mean and reciprocal deviation of every
# block, float32 [T]. Vectors come as float32, the matrix in the dtype of the products.
torch.library.define(
    "simmim::merge_patches",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
# Gradients of x, norm_weight, norm_bias and weight, each in the dtype of its tensor; [0] for all
# but x unless `of_parameters`.
torch.library.define(
    "simmim::merge_patches_backward",
    "(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, "
    "Tensor mean, Tensor rstd, bool of_parameters, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("simmim::merge_patches", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, eps, backend = arguments
    kernel = implementation("merge_patches", backend)
    found: tuple[Tensor, Tensor, Tensor] = kernel.forward(*(t.contiguous() for t in tensors), eps)
    return found


@torch.library.impl("simmim::merge_patches_backward", "CompositeExplicitAutograd")
def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, of_parameters, backend = arguments
    kernel = implementation("merge_patches", backend)
    grads: tuple[Tensor, ...] = kernel.backward(*(t.contiguous() for t in tensors), of_parameters)
    return grads


def _fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *unused: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, _ = x.shape
    per_row = x.new_empty((B * (H // 2) * (W // 2),), dtype=torch.float32)
    out = x.new_empty((B, H // 2, W // 2, weight.shape[0]))
    return out, per_row, torch.empty_like(per_row)


torch.library.register_fake("simmim::merge_patches", _fake)


def _backward_fake(grad_out: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, of_parameters, _ = arguments
    return x.new_empty(x.shape), *(
        p.new_empty(p.shape) if of_parameters else x.new_empty(0, dtype=torch.float32)
        for p in parameters
    )


torch.library.register_fake("simmim::merge_patches_backward", _backward_fake)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.backend = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor one time only
    found = torch.ops.simmim.merge_patches_backward(grad_out, *saved, any(wanted[1:]), ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted)), None, None


torch.library.register_autograd("simmim::merge_patches", _backward, setup_context=_context)
torch.library.register_autograd("simmim::merge_patches_backward", no_second_order)
