"""The MLP branches of a transformer block: normalised at their start or at their end."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, describe
from simmim_kernels.dtypes import autocast, check_dtypes, of_kernels, of_reference
from simmim_kernels.op import Op, gradients_like
from simmim_kernels.transformer_block import reference
from simmim_kernels.transformer_block.arguments import (
    MlpParameters,
    NormalisedBranch,
    Statistics,
    check_vectors,
    statistics_of,
)


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
    parameters = MlpParameters(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma
    )
    op, definition = _residual_mlp, reference.residual_mlp
    return _mlp(op, definition, x, parameters, branch_scale, eps, backend)


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
    parameters = MlpParameters(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, None
    )
    op, definition = _post_norm_mlp, reference.post_norm_mlp
    return _mlp(op, definition, x, parameters, branch_scale, eps, backend)


def _mlp(
    op: Op[..., Any],
    definition: Callable[..., Tensor],
    x: Tensor,
    parameters: MlpParameters,
    branch_scale: Tensor | None,
    eps: float,
    backend: str | None,
) -> Tensor:
    """Checks the arguments of either branch, casts them and runs its op or its reference."""

    def error(what: str) -> ValueError:
        given = describe(x=x, **parameters._asdict(), branch_scale=branch_scale)
        return ValueError(f"{what}: {given}")

    if x.dim() < 2:
        raise error("expected x [B, …, C]")
    fc1, fc2 = parameters.fc1_weight, parameters.fc2_weight
    C, M = x.shape[-1], fc1.shape[0]
    if fc1.shape != (M, C) or fc2.shape != (C, M) or parameters.fc1_bias.shape != (M,):
        raise error("expected fc1_weight [M, C], fc1_bias [M] and fc2_weight [C, M]")
    check_vectors(x, parameters, parameters.fc2_bias, branch_scale, error)
    x = autocast(x)
    check_dtypes(x, parameters, error)
    chosen = choose(op.name, BACKENDS, (x, *parameters, branch_scale), backend)
    if chosen == "reference":
        return definition(x, MlpParameters(*of_reference(x, parameters)), branch_scale, eps)
    cast = MlpParameters(*of_kernels(parameters, chosen, x.dtype))
    if branch_scale is not None:
        branch_scale = branch_scale.detach().float()
    out: Tensor = op(chosen, x, cast, branch_scale, eps).out
    return out


class ResidualMlp(NamedTuple):
    """The output of the branch that normalises x, and what its backward needs.

    Attributes:
        out: like x.
        hidden: [T, M], the output of fc1 without its bias.
        norm: that of x.
    """

    out: Tensor
    hidden: Tensor
    norm: Statistics


class PostNormMlp(NamedTuple):
    """The output of the branch that normalises what it adds, and what its backward needs.

    Attributes:
        out: like x.
        hidden: [T, M], the output of fc1 without its bias.
        norm: that of the output of fc2.
    """

    out: Tensor
    hidden: Tensor
    norm: NormalisedBranch


def _hidden(x: Tensor, parameters: MlpParameters) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], len(parameters.fc1_weight)))


def _residual_shapes(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> ResidualMlp:
    return ResidualMlp(x.new_empty(x.shape), _hidden(x, parameters), statistics_of(x))


def _residual_gradients(
    grad_out: Tensor,
    x: Tensor,
    parameters: MlpParameters,
    branch_scale: Tensor | None,
    hidden: Tensor,
    norm: Statistics,
    of_parameters: bool,
) -> list[Tensor | None]:
    return gradients_like(x, *parameters, of_parameters=of_parameters)


def _post_norm_shapes(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> PostNormMlp:
    out, hidden, norm = _residual_shapes(x, parameters, branch_scale, eps)
    branch = x.new_empty((len(hidden), x.shape[-1]))
    return PostNormMlp(out, hidden, NormalisedBranch(branch, *norm))


def _post_norm_gradients(
    grad_out: Tensor,
    x: Tensor,
    parameters: MlpParameters,
    branch_scale: Tensor | None,
    hidden: Tensor,
    norm: NormalisedBranch,
    of_parameters: bool,
) -> list[Tensor | None]:
    return gradients_like(x, *parameters, of_parameters=of_parameters)


_residual_mlp = Op(
    "residual_mlp",
    _residual_shapes,
    _residual_gradients,
    gradients=("x", "parameters"),
    folder="transformer_block",
)
_post_norm_mlp = Op(
    "post_norm_mlp",
    _post_norm_shapes,
    _post_norm_gradients,
    gradients=("x", "parameters"),
    folder="transformer_block",
)
