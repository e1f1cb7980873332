"""Residual branches that are normalised before they are added, each one op that saves the minimum.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, S tokens of a
window, T = B·H·W.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, describe, implementation, no_second_order
from simmim_kernels.dtypes import autocast, check_dtypes, of_reference, product_dtype
from simmim_kernels.post_norm_block import reference
from simmim_kernels.window_attention import COSINE_BACKENDS as ATTENTION_BACKENDS
from simmim_kernels.window_attention import both_ways, check_window, cosine_factors, pair_bias

__all__ = ["ATTENTION_BACKENDS", "BACKENDS", "post_norm_attention", "post_norm_mlp"]


def post_norm_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    logit_scale: Tensor,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    num_heads: int,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    branch_scale: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """x + branch_scale · layer_norm(proj(window_attention(qkv(x)))), attention by cosines.

    For the backward it keeps x, qkv, the attended values, the branch before its norm, two numbers
    per token (float32: mean and reciprocal deviation) and one per token and head; no matrix product
    is computed again.

    Args:
        x: [B, H, W, C]; float32, bfloat16 or float16.
        qkv_weight: [3C, C]; heads of q, then of k, then of v.
        qkv_bias: [3C] or None.
        logit_scale: [N], as for `window_attention`.
        bias: position bias, as for `window_attention`.
        proj_weight: [C, C].
        proj_bias: [C].
        norm_weight: [C], with norm_bias [C] the affine part of the LayerNorm.
        norm_bias: [C].
        num_heads: as for `window_attention`.
        window: as for `window_attention`.
        shift: as for `window_attention`.
        branch_scale: [B], factor of each image's branch (stochastic depth); None is 1. No gradient.
        eps: of the LayerNorm.
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    Dtypes are those of `residual_attention`; scores are float32 at least.

    Returns:
        [B, H, W, C], the dtype that x was cast to. Gradient (first order) flows to x and to every
        parameter.

    Raises:
        ValueError: shapes or dtypes disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/Swin-Transformer models/swin_transformer_v2.py SwinTransformerBlock.
    """
    window, shift = both_ways(window), both_ways(shift)
    given: dict[str, Any] = {
        "x": x,
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "logit_scale": logit_scale,
        "bias": bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "branch_scale": branch_scale,
        "num_heads": num_heads,
    }

    def error(what: str) -> ValueError:
        return ValueError(f"{what}: {describe(**given)}, window {window}, shift {shift}")

    if x.dim() != 4 or num_heads < 1 or x.shape[3] % num_heads:
        raise error("expected x [B, H, W, C] with num_heads dividing C")
    C = x.shape[3]
    check_window(x.shape[1:3], window, shift, error)
    if qkv_weight.shape != (3 * C, C) or proj_weight.shape != (C, C):
        raise error("expected qkv_weight [3C, C] and proj_weight [C, C]")
    if qkv_bias is not None and qkv_bias.shape != (3 * C,):
        raise error("expected qkv_bias [3C]")
    _check_vectors((proj_bias, norm_weight, norm_bias), branch_scale, x, error)
    if bias is not None:
        bias = pair_bias(bias, num_heads, window, error)
    x = autocast(x)
    factors = cosine_factors(logit_scale, num_heads, x, error)
    weights = (qkv_weight, qkv_bias, bias, proj_weight, proj_bias, norm_weight, norm_bias)
    check_dtypes(x, weights, error)
    inputs = (x, factors, *weights, branch_scale)
    chosen = choose("post_norm_attention", ATTENTION_BACKENDS, inputs, backend)
    if chosen == "reference":
        qkv_weight, qkv_bias, *others = of_reference(x, (qkv_weight, qkv_bias, *weights[3:]))
        branch: Callable[..., Tensor] = partial(reference.post_norm_attention, x, qkv_weight)
        return branch(qkv_bias, factors, bias, *others, branch_scale, num_heads, window, shift, eps)
    dtype = product_dtype(chosen, x.dtype)
    out: Tensor = torch.ops.simmim.post_norm_attention(
        x,
        qkv_weight.to(dtype),
        None if qkv_bias is None else qkv_bias.float(),
        factors.float(),
        None if bias is None else bias.float(),
        proj_weight.to(dtype),
        proj_bias.float(),
        norm_weight.float(),
        norm_bias.float(),
        None if branch_scale is None else branch_scale.detach().float(),
        num_heads,
        list(window),
        list(shift),
        eps,
        chosen,
    )[0]
    return out


def post_norm_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    branch_scale: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """x + branch_scale · layer_norm(fc2(gelu(fc1(x)))), with the exact (erf) GELU.

    For the backward it keeps x, the outputs of fc1 and fc2 and two numbers per token; the output of
    the GELU is computed again, no matrix product is.

    Args:
        x: [B, …, C]; float32, bfloat16 or float16.
        fc1_weight: [M, C].
        fc1_bias: [M].
        fc2_weight: [C, M].
        fc2_bias: [C].
        norm_weight: [C], with norm_bias [C] the affine part of the LayerNorm.
        norm_bias: [C].
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

    Source: microsoft/Swin-Transformer models/swin_transformer_v2.py SwinTransformerBlock and Mlp.
    """
    given: dict[str, Any] = {
        "x": x,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "branch_scale": branch_scale,
    }

    def error(what: str) -> ValueError:
        return ValueError(f"{what}: {describe(**given)}")

    if x.dim() < 2:
        raise error("expected x [B, …, C]")
    C, M = x.shape[-1], fc1_weight.shape[0]
    if fc1_weight.shape != (M, C) or fc2_weight.shape != (C, M) or fc1_bias.shape != (M,):
        raise error("expected fc1_weight [M, C], fc1_bias [M] and fc2_weight [C, M]")
    _check_vectors((fc2_bias, norm_weight, norm_bias), branch_scale, x, error)
    x = autocast(x)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias)
    check_dtypes(x, weights, error)
    chosen = choose("post_norm_mlp", BACKENDS, (x, *weights, branch_scale), backend)
    if chosen == "reference":
        branch: Callable[..., Tensor] = reference.post_norm_mlp
        return branch(x, *of_reference(x, weights), branch_scale, eps)
    dtype = product_dtype(chosen, x.dtype)
    out: Tensor = torch.ops.simmim.post_norm_mlp(
        x,
        fc1_weight.to(dtype),
        fc1_bias.float(),
        fc2_weight.to(dtype),
        fc2_bias.float(),
        norm_weight.float(),
        norm_bias.float(),
        None if branch_scale is None else branch_scale.detach().float(),
        eps,
        chosen,
    )[0]
    return out


def _check_vectors(
    vectors: tuple[Tensor, ...], branch_scale: Tensor | None, x: Tensor, error: Any
) -> None:
    if any(v.shape != x.shape[-1:] for v in vectors):
        raise error("the last bias, norm_weight and norm_bias must be [C]")
    if branch_scale is not None and branch_scale.shape != x.shape[:1]:
        raise error("expected branch_scale [B]")


# Outputs beyond the result are what the backward needs: qkv [B, H, W, 3C] and the attended values
# [B, H, W, C] in the dtype of x, log_sums float32 [B, H, W, N] of `window_attention`, the branch
# without its bias, [T, C] in the dtype of x, and mean and reciprocal deviation of every token,
# float32 [T]. Vectors and biases come as float32, matrices in the dtype of the products.
torch.library.define(
    "simmim::post_norm_attention",
    "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor factors, Tensor? bias, "
    "Tensor proj_weight, Tensor proj_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor? branch_scale, SymInt num_heads, SymInt[] window, SymInt[] shift, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# Gradients of x and of the parameters in their order, each in the dtype of its tensor; [0] for a
# tensor that is None and, unless `of_parameters`, for all but x.
torch.library.define(
    "simmim::post_norm_attention_backward",
    "(Tensor grad_out, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor factors, "
    "Tensor? bias, Tensor proj_weight, Tensor proj_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor? branch_scale, Tensor qkv, Tensor attended, Tensor log_sums, Tensor branch, "
    "Tensor mean, Tensor rstd, SymInt num_heads, SymInt[] window, SymInt[] shift, "
    "bool of_parameters, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# Beyond the result: the outputs of fc1 [T, M] and fc2 [T, C] without their biases in the dtype of
# x, mean and reciprocal deviation.
torch.library.define(
    "simmim::post_norm_mlp",
    "(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, "
    "Tensor norm_weight, Tensor norm_bias, Tensor? branch_scale, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "simmim::post_norm_mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
    "Tensor fc2_bias, Tensor norm_weight, Tensor norm_bias, Tensor? branch_scale, Tensor hidden, "
    "Tensor branch, Tensor mean, Tensor rstd, bool of_parameters, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

ATTENTION_PARAMETERS, MLP_PARAMETERS = 8, 6


def _contiguous(tensors: tuple[Any, ...]) -> list[Any]:
    return [t.contiguous() if isinstance(t, Tensor) else t for t in tensors]


@torch.library.impl("simmim::post_norm_attention", "CompositeExplicitAutograd")
def _attention_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, num_heads, window, shift, eps, backend = arguments
    kernel = implementation("post_norm_block", backend)
    found: tuple[Tensor, ...] = kernel.attention_forward(
        *_contiguous(tuple(tensors)), num_heads, tuple(window), tuple(shift), eps
    )
    return found


@torch.library.impl("simmim::post_norm_attention_backward", "CompositeExplicitAutograd")
def _attention_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, num_heads, window, shift, of_parameters, backend = arguments
    kernel = implementation("post_norm_block", backend)
    grads: tuple[Tensor, ...] = kernel.attention_backward(
        *_contiguous(tuple(tensors)), num_heads, tuple(window), tuple(shift), of_parameters
    )
    return grads


@torch.library.impl("simmim::post_norm_mlp", "CompositeExplicitAutograd")
def _mlp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, eps, backend = arguments
    kernel = implementation("post_norm_block", backend)
    found: tuple[Tensor, ...] = kernel.mlp_forward(*_contiguous(tuple(tensors)), eps)
    return found


@torch.library.impl("simmim::post_norm_mlp_backward", "CompositeExplicitAutograd")
def _mlp_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, of_parameters, backend = arguments
    kernel = implementation("post_norm_block", backend)
    grads: tuple[Tensor, ...] = kernel.mlp_backward(*_contiguous(tuple(tensors)), of_parameters)
    return grads


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    per_token = x.new_empty((tokens,), dtype=torch.float32)
    return x.new_empty((tokens, x.shape[-1])), per_token, torch.empty_like(per_token)


def _attention_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    B, H, W, C = x.shape
    log_sums = x.new_empty((B, H, W, arguments[9]), dtype=torch.float32)
    qkv, attended = x.new_empty((B, H, W, 3 * C)), x.new_empty(x.shape)
    return x.new_empty(x.shape), qkv, attended, log_sums, *_statistics(x)


torch.library.register_fake("simmim::post_norm_attention", _attention_fake)


def _mlp_fake(x: Tensor, fc1_weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    branch, mean, rstd = _statistics(x)
    return x.new_empty(x.shape), x.new_empty((len(branch), len(fc1_weight))), branch, mean, rstd


torch.library.register_fake("simmim::post_norm_mlp", _mlp_fake)


def _gradients_like(x: Tensor, parameters: tuple[Tensor | None, ...], of_parameters: bool) -> Any:
    return x.new_empty(x.shape), *(
        x.new_empty(0, dtype=torch.float32)
        if p is None or not of_parameters
        else p.new_empty(p.shape)
        for p in parameters
    )


def _attention_backward_fake(grad_out: Tensor, x: Tensor, *arguments: Any) -> Any:
    return _gradients_like(x, arguments[:ATTENTION_PARAMETERS], arguments[-2])


torch.library.register_fake("simmim::post_norm_attention_backward", _attention_backward_fake)


def _mlp_backward_fake(grad_out: Tensor, x: Tensor, *arguments: Any) -> Any:
    return _gradients_like(x, arguments[:MLP_PARAMETERS], arguments[-2])


torch.library.register_fake("simmim::post_norm_mlp_backward", _mlp_backward_fake)


def _keep(ctx: Any, tensors: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *ctx.settings, _, ctx.backend = inputs[10:]
    _keep(ctx, inputs[:10], output)


def _attention_backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> Any:
    if grad_out is None:
        return (None,) * 15
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor one time only
    wanted = ctx.needs_input_grad[: 1 + ATTENTION_PARAMETERS]
    found = torch.ops.simmim.post_norm_attention_backward(
        grad_out, *saved, *ctx.settings, any(wanted[1:]), ctx.backend
    )
    return *_wanted(found, wanted), *(None,) * 6


torch.library.register_autograd(
    "simmim::post_norm_attention", _attention_backward, setup_context=_attention_context
)
torch.library.register_autograd("simmim::post_norm_attention_backward", no_second_order)


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[9]
    _keep(ctx, inputs[:8], output)


def _mlp_backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> Any:
    if grad_out is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor one time only
    wanted = ctx.needs_input_grad[: 1 + MLP_PARAMETERS]
    found = torch.ops.simmim.post_norm_mlp_backward(grad_out, *saved, any(wanted[1:]), ctx.backend)
    return *_wanted(found, wanted), *(None,) * 3


torch.library.register_autograd("simmim::post_norm_mlp", _mlp_backward, setup_context=_mlp_context)
torch.library.register_autograd("simmim::post_norm_mlp_backward", no_second_order)


def _wanted(found: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    return [gradient if is_wanted else None for gradient, is_wanted in zip(found, wanted)]
