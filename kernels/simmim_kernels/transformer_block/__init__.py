"""The residual branches of a pre-norm transformer block, each as one op that saves the minimum.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, S tokens of a
window, T = B·H·W.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, describe, implementation, no_second_order
from simmim_kernels.dtypes import autocast, check_dtypes, of_reference, product_dtype
from simmim_kernels.transformer_block import reference
from simmim_kernels.window_attention import BACKENDS as ATTENTION_BACKENDS
from simmim_kernels.window_attention import both_ways, check_window, pair_bias, plain

__all__ = ["BACKENDS", "residual_attention", "residual_mlp"]


def residual_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    num_heads: int,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    gamma: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """x + branch_scale · gamma · proj(window_attention(qkv(layer_norm(x)))).

    For the backward it keeps x, qkv, the attended values and two numbers per token (float32: mean
    and reciprocal deviation) and one per token and head; the normalised input is computed again,
    no matrix product is.

    Args:
        x: [B, H, W, C]; float32, bfloat16 or float16.
        norm_weight: [C], with norm_bias [C] the affine part of the LayerNorm.
        norm_bias: [C].
        qkv_weight: [3C, C]; heads of q, then of k, then of v.
        qkv_bias: [3C] or None.
        bias: position bias, as for `window_attention`.
        proj_weight: [C, C].
        proj_bias: [C].
        num_heads: as for `window_attention`.
        window: as for `window_attention`.
        shift: as for `window_attention`.
        scale: as for `window_attention`.
        gamma: [C], LayerScale; None is 1.
        branch_scale: [B], factor of each image's branch (stochastic depth); None is 1. No gradient.
        eps: of the LayerNorm.
        backend: "triton" (GPU), "native" (CPU), "reference" or "xformers" (PyTorch's operations
            around that attention); None takes the first that can run.

    Under autocast x is cast to its dtype; parameters stay float32 and matrix products run in the
    autocast dtype, on a CPU that only emulates 16-bit products in float32. Without autocast all
    tensors share a dtype, or vectors and biases are float32.

    Returns:
        [B, H, W, C], the dtype that x was cast to. Gradient (first order) flows to x and to every
        parameter.

    Raises:
        ValueError: shapes or dtypes disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/swin_transformer.py SwinTransformerBlock.
    """
    window, shift = both_ways(window), both_ways(shift)

    def error(what: str) -> ValueError:
        given = describe(
            x=x,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            bias=bias,
            proj_weight=proj_weight,
            proj_bias=proj_bias,
            gamma=gamma,
            branch_scale=branch_scale,
            num_heads=num_heads,
        )
        return ValueError(f"{what}: {given}, window {window}, shift {shift}")

    if x.dim() != 4 or num_heads < 1 or x.shape[3] % num_heads:
        raise error("expected x [B, H, W, C] with num_heads dividing C")
    C = x.shape[3]
    check_window(x.shape[1:3], window, shift, error)
    if qkv_weight.shape != (3 * C, C) or proj_weight.shape != (C, C):
        raise error("expected qkv_weight [3C, C] and proj_weight [C, C]")
    if qkv_bias is not None and qkv_bias.shape != (3 * C,):
        raise error("expected qkv_bias [3C]")
    _check_vectors((norm_weight, norm_bias, proj_bias, gamma), branch_scale, x, error)
    if bias is not None:
        bias = pair_bias(bias, num_heads, window, error)
    scale = scale or (C // num_heads) ** -0.5
    x = autocast(x)
    weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, proj_bias, gamma)
    check_dtypes(x, weights, error)
    chosen = choose("residual_attention", ATTENTION_BACKENDS, (x, *weights, branch_scale), backend)
    if chosen in ("reference", "xformers"):
        branch: Callable[..., Tensor] = reference.residual_attention
        return branch(
            x,
            *of_reference(x, (*weights, branch_scale)),
            num_heads=num_heads,
            window=window,
            shift=shift,
            scale=scale,
            eps=eps,
            attend=plain(chosen),
        )
    dtype = product_dtype(chosen, x.dtype)
    out: Tensor = torch.ops.simmim.residual_attention(
        x,
        norm_weight.float(),
        norm_bias.float(),
        qkv_weight.to(dtype),
        None if qkv_bias is None else qkv_bias.float(),
        None if bias is None else bias.float(),
        proj_weight.to(dtype),
        proj_bias.float(),
        None if gamma is None else gamma.float(),
        None if branch_scale is None else branch_scale.detach().float(),
        num_heads,
        list(window),
        list(shift),
        scale,
        eps,
        chosen,
    )[0]
    return out


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    gamma: Tensor | None = None,
    branch_scale: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """x + branch_scale · gamma · fc2(gelu(fc1(layer_norm(x)))), with the exact (erf) GELU.

    For the backward it keeps x, the output of fc1 and two numbers per token; the normalised input
    and the output of the GELU are computed again, no matrix product is.

    Args:
        x: [B, …, C]; float32, bfloat16 or float16.
        norm_weight: [C], with norm_bias [C] the affine part of the LayerNorm.
        norm_bias: [C].
        fc1_weight: [M, C].
        fc1_bias: [M].
        fc2_weight: [C, M].
        fc2_bias: [C].
        gamma: [C], LayerScale; None is 1.
        branch_scale: [B], factor of each image's branch (stochastic depth); None is 1. No gradient.
        eps: of the LayerNorm.
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    Dtypes are those of `residual_attention`.

    Returns:
        [B, …, C], the dtype that x was cast to. Gradient (first order) flows to x and to every
        parameter.

    Raises:
        ValueError: shapes or dtypes disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/swin_transformer.py SwinTransformerBlock and Mlp.
    """

    def error(what: str) -> ValueError:
        given = describe(
            x=x,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            fc1_weight=fc1_weight,
            fc1_bias=fc1_bias,
            fc2_weight=fc2_weight,
            fc2_bias=fc2_bias,
            gamma=gamma,
            branch_scale=branch_scale,
        )
        return ValueError(f"{what}: {given}")

    if x.dim() < 2:
        raise error("expected x [B, …, C]")
    C, M = x.shape[-1], fc1_weight.shape[0]
    if fc1_weight.shape != (M, C) or fc2_weight.shape != (C, M) or fc1_bias.shape != (M,):
        raise error("expected fc1_weight [M, C], fc1_bias [M] and fc2_weight [C, M]")
    _check_vectors((norm_weight, norm_bias, fc2_bias, gamma), branch_scale, x, error)
    x = autocast(x)
    weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma)
    check_dtypes(x, weights, error)
    chosen = choose("residual_mlp", BACKENDS, (x, *weights, branch_scale), backend)
    if chosen == "reference":
        branch: Callable[..., Tensor] = reference.residual_mlp
        return branch(x, *of_reference(x, (*weights, branch_scale)), eps=eps)
    dtype = product_dtype(chosen, x.dtype)
    out: Tensor = torch.ops.simmim.residual_mlp(
        x,
        norm_weight.float(),
        norm_bias.float(),
        fc1_weight.to(dtype),
        fc1_bias.float(),
        fc2_weight.to(dtype),
        fc2_bias.float(),
        None if gamma is None else gamma.float(),
        None if branch_scale is None else branch_scale.detach().float(),
        eps,
        chosen,
    )[0]
    return out


def _check_vectors(
    vectors: tuple[Tensor | None, ...], branch_scale: Tensor | None, x: Tensor, error: Any
) -> None:
    if any(v is not None and v.shape != x.shape[-1:] for v in vectors):
        raise error("norm_weight, norm_bias, the last bias and gamma must be [C]")
    if branch_scale is not None and branch_scale.shape != x.shape[:1]:
        raise error("expected branch_scale [B]")


# Outputs beyond the result are what the backward needs: qkv [B, H, W, 3C] and the attended values
# [B, H, W, C] in the dtype of x, log_sums float32 [B, H, W, N] of `window_attention`, and mean and
# reciprocal deviation of every token, float32 [T]. Vectors and biases come as float32, matrices in
# the dtype of the products.
torch.library.define(
    "simmim::residual_attention",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor? bias, Tensor proj_weight, Tensor proj_bias, Tensor? gamma, Tensor? branch_scale, "
    "SymInt num_heads, SymInt[] window, SymInt[] shift, float scale, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# Gradients of x, norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, proj_bias and
# gamma, each in the dtype of its tensor; [0] for a tensor that is None and, unless `of_parameters`,
# for all but x.
torch.library.define(
    "simmim::residual_attention_backward",
    "(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, "
    "Tensor? qkv_bias, Tensor? bias, Tensor proj_weight, Tensor proj_bias, Tensor? gamma, "
    "Tensor? branch_scale, Tensor qkv, Tensor attended, Tensor log_sums, Tensor mean, Tensor rstd, "
    "SymInt num_heads, SymInt[] window, SymInt[] shift, float scale, bool of_parameters, "
    "str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# Beyond the result: the output of fc1 without its bias, [T, M] in the dtype of x, mean and
# reciprocal deviation.
torch.library.define(
    "simmim::residual_mlp",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, Tensor? gamma, Tensor? branch_scale, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
# Gradients of x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias and gamma.
torch.library.define(
    "simmim::residual_mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor? gamma, Tensor? branch_scale, "
    "Tensor hidden, Tensor mean, Tensor rstd, bool of_parameters, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

ATTENTION_PARAMETERS, MLP_PARAMETERS = 8, 7


def _contiguous(tensors: tuple[Any, ...]) -> list[Any]:
    return [t.contiguous() if isinstance(t, Tensor) else t for t in tensors]


@torch.library.impl("simmim::residual_attention", "CompositeExplicitAutograd")
def _attention_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, num_heads, window, shift, scale, eps, backend = arguments
    kernel = implementation("transformer_block", backend)
    found: tuple[Tensor, ...] = kernel.attention_forward(
        *_contiguous(tuple(tensors)), num_heads, tuple(window), tuple(shift), scale, eps
    )
    return found


@torch.library.impl("simmim::residual_attention_backward", "CompositeExplicitAutograd")
def _attention_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, num_heads, window, shift, scale, of_parameters, backend = arguments
    kernel = implementation("transformer_block", backend)
    grads: tuple[Tensor, ...] = kernel.attention_backward(
        *_contiguous(tuple(tensors)), num_heads, tuple(window), tuple(shift), scale, of_parameters
    )
    return grads


@torch.library.impl("simmim::residual_mlp", "CompositeExplicitAutograd")
def _mlp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, eps, backend = arguments
    kernel = implementation("transformer_block", backend)
    found: tuple[Tensor, ...] = kernel.mlp_forward(*_contiguous(tuple(tensors)), eps)
    return found


@torch.library.impl("simmim::residual_mlp_backward", "CompositeExplicitAutograd")
def _mlp_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, of_parameters, backend = arguments
    kernel = implementation("transformer_block", backend)
    grads: tuple[Tensor, ...] = kernel.mlp_backward(*_contiguous(tuple(tensors)), of_parameters)
    return grads


def _attention_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    B, H, W, C = x.shape
    num_heads = arguments[9]
    per_token = x.new_empty((B * H * W,), dtype=torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty((B, H, W, 3 * C)),
        x.new_empty(x.shape),
        x.new_empty((B, H, W, num_heads), dtype=torch.float32),
        per_token,
        torch.empty_like(per_token),
    )


torch.library.register_fake("simmim::residual_attention", _attention_fake)


def _mlp_fake(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *arguments: Any) -> Any:
    tokens = x.numel() // x.shape[-1]
    per_token = x.new_empty((tokens,), dtype=torch.float32)
    hidden = x.new_empty((tokens, arguments[0].shape[0]))
    return x.new_empty(x.shape), hidden, per_token, torch.empty_like(per_token)


torch.library.register_fake("simmim::residual_mlp", _mlp_fake)


def _gradients_like(x: Tensor, parameters: tuple[Tensor | None, ...], of_parameters: bool) -> Any:
    return x.new_empty(x.shape), *(
        x.new_empty(0, dtype=torch.float32)
        if p is None or not of_parameters
        else p.new_empty(p.shape)
        for p in parameters
    )


def _attention_backward_fake(grad_out: Tensor, x: Tensor, *arguments: Any) -> Any:
    return _gradients_like(x, arguments[:ATTENTION_PARAMETERS], arguments[-2])


torch.library.register_fake("simmim::residual_attention_backward", _attention_backward_fake)


def _mlp_backward_fake(grad_out: Tensor, x: Tensor, *arguments: Any) -> Any:
    return _gradients_like(x, arguments[:MLP_PARAMETERS], arguments[-2])


torch.library.register_fake("simmim::residual_mlp_backward", _mlp_backward_fake)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (*ctx.settings, _, ctx.backend) = inputs[:10], inputs[10:]
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _attention_backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> Any:
    if grad_out is None:
        return (None,) * 16
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor one time only
    parameters = saved[1 : 1 + ATTENTION_PARAMETERS]
    wanted = ctx.needs_input_grad[: 1 + ATTENTION_PARAMETERS]
    found = torch.ops.simmim.residual_attention_backward(
        grad_out, *saved, *ctx.settings, any(wanted[1:]), ctx.backend
    )
    return *_wanted(found, parameters, wanted), *(None,) * 7


torch.library.register_autograd(
    "simmim::residual_attention", _attention_backward, setup_context=_attention_context
)
torch.library.register_autograd("simmim::residual_attention_backward", no_second_order)


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (_, ctx.backend) = inputs[:9], inputs[9:]
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _mlp_backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> Any:
    if grad_out is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor one time only
    parameters = saved[1 : 1 + MLP_PARAMETERS]
    wanted = ctx.needs_input_grad[: 1 + MLP_PARAMETERS]
    found = torch.ops.simmim.residual_mlp_backward(grad_out, *saved, any(wanted[1:]), ctx.backend)
    return *_wanted(found, parameters, wanted), *(None,) * 3


torch.library.register_autograd("simmim::residual_mlp", _mlp_backward, setup_context=_mlp_context)
torch.library.register_autograd("simmim::residual_mlp_backward", no_second_order)


def _wanted(
    found: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    there = (True, *(p is not None for p in parameters))
    return [g if w and t else None for g, w, t in zip(found, wanted, there, strict=True)]
