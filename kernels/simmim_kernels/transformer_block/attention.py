"""The attention branches of a transformer block: normalised at their start or at their end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simmim_kernels.dispatch import choose, describe
from simmim_kernels.dtypes import autocast, check_dtypes, in_float32, of_kernels, of_reference
from simmim_kernels.op import Op, gradients_like
from simmim_kernels.transformer_block import reference
from simmim_kernels.transformer_block.arguments import (
    Attended,
    AttentionParameters,
    NormalisedBranch,
    Statistics,
    check_vectors,
    statistics_of,
)
from simmim_kernels.window_attention import (
    BACKENDS,
    COSINE_BACKENDS,
    bias_of_kernels,
    both_ways,
    check_bias,
    check_window,
    cosine_factors,
    plain,
)
from simmim_kernels.window_attention.arguments import Windows


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
    parameters = AttentionParameters(
        norm_weight, norm_bias, qkv_weight, qkv_bias, None, bias, proj_weight, proj_bias, gamma
    )
    windows = Windows(num_heads, both_ways(window), both_ways(shift), scale or 0.0)
    op, definition = _residual_attention, reference.residual_attention
    return _attention(op, definition, x, parameters, branch_scale, windows, eps, backend)


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
    parameters = AttentionParameters(
        norm_weight, norm_bias, qkv_weight, qkv_bias, None, bias, proj_weight, proj_bias, None
    )
    windows = Windows(num_heads, both_ways(window), both_ways(shift), 1.0)
    op, definition = _post_norm_attention, reference.post_norm_attention
    return _attention(
        op, definition, x, parameters, branch_scale, windows, eps, backend, logit_scale
    )


def _attention(
    op: Op[..., Any],
    definition: Callable[..., Tensor],
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
    backend: str | None,
    logit_scale: Tensor | None = None,
) -> Tensor:
    """Checks the arguments of either branch, casts them and runs its op or its reference."""
    num_heads, window, shift, scale = windows

    def error(what: str) -> ValueError:
        given = describe(
            x=x,
            **parameters._asdict(),
            logit_scale=logit_scale,
            branch_scale=branch_scale,
            num_heads=num_heads,
        )
        return ValueError(f"{what}: {given}, window {window}, shift {shift}")

    if x.dim() != 4 or num_heads < 1 or x.shape[3] % num_heads:
        raise error("expected x [B, H, W, C] with num_heads dividing C")
    C = x.shape[3]
    check_window(x.shape[1:3], window, shift, error)
    if parameters.qkv_weight.shape != (3 * C, C) or parameters.proj_weight.shape != (C, C):
        raise error("expected qkv_weight [3C, C] and proj_weight [C, C]")
    if parameters.qkv_bias is not None and parameters.qkv_bias.shape != (3 * C,):
        raise error("expected qkv_bias [3C]")
    check_vectors(x, parameters, parameters.proj_bias, branch_scale, error)
    bias, factors = parameters.bias, None
    if bias is not None:
        check_bias(bias, num_heads, window, error)
    x = autocast(x)
    if logit_scale is not None:
        factors = cosine_factors(logit_scale, num_heads, x, error)
    cast = parameters._replace(factors=factors)
    check_dtypes(x, cast, error)
    windows = windows._replace(scale=scale or (C // num_heads) ** -0.5)
    backends = BACKENDS if logit_scale is None else COSINE_BACKENDS
    chosen = choose(op.name, backends, (x, *cast, branch_scale), backend)
    bias = bias_of_kernels(bias, chosen, window)
    cast = cast._replace(bias=bias)
    if chosen in ("reference", "xformers"):
        plain_parameters = AttentionParameters(*of_reference(x, cast))
        if logit_scale is not None:  # scores by cosines are float32 at least
            plain_parameters = plain_parameters._replace(bias=bias, factors=factors)
        return definition(x, plain_parameters, branch_scale, windows, eps, attend=plain(chosen))
    # the bias may be a table, which is no matrix of products
    cast = AttentionParameters(*of_kernels(cast._replace(bias=None), chosen, x.dtype))
    cast = cast._replace(bias=in_float32(bias))
    if branch_scale is not None:
        branch_scale = branch_scale.detach().float()
    out: Tensor = op(chosen, x, cast, branch_scale, windows, eps).out
    return out


class ResidualAttention(NamedTuple):
    """The output of the branch that normalises x, and what its backward needs."""

    out: Tensor
    attention: Attended
    norm: Statistics


class PostNormAttention(NamedTuple):
    """The output of the branch that normalises what it adds, and what its backward needs."""

    out: Tensor
    attention: Attended
    norm: NormalisedBranch


def _attended(x: Tensor, windows: Windows) -> Attended:
    B, H, W, C = x.shape
    log_sums = x.new_empty((B, H, W, windows.num_heads), dtype=torch.float32)
    return Attended(x.new_empty((B, H, W, 3 * C)), x.new_empty(x.shape), log_sums)


def _residual_shapes(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> ResidualAttention:
    return ResidualAttention(x.new_empty(x.shape), _attended(x, windows), statistics_of(x))


def _residual_gradients(
    grad_out: Tensor,
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    attention: Attended,
    norm: Statistics,
    windows: Windows,
    of_parameters: bool,
) -> list[Tensor | None]:
    return gradients_like(x, *parameters, of_parameters=of_parameters)


def _post_norm_shapes(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> PostNormAttention:
    branch = x.new_empty((x.numel() // x.shape[-1], x.shape[-1]))
    norm = NormalisedBranch(branch, *statistics_of(x))
    return PostNormAttention(x.new_empty(x.shape), _attended(x, windows), norm)


def _post_norm_gradients(
    grad_out: Tensor,
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    attention: Attended,
    norm: NormalisedBranch,
    windows: Windows,
    of_parameters: bool,
) -> list[Tensor | None]:
    return gradients_like(x, *parameters, of_parameters=of_parameters)


_residual_attention = Op(
    "residual_attention",
    _residual_shapes,
    _residual_gradients,
    gradients=("x", "parameters"),
    folder="transformer_block",
)
_post_norm_attention = Op(
    "post_norm_attention",
    _post_norm_shapes,
    _post_norm_gradients,
    gradients=("x", "parameters"),
    folder="transformer_block",
)
