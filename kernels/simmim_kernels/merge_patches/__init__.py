"""Patch merging: four neighbouring tokens become one, normalised and projected.

B batch, H W token rows and columns, C width, M width of the output, T = B · H/2 · W/2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, describe
from simmim_kernels.dtypes import autocast, check_dtypes, of_kernels, of_reference
from simmim_kernels.merge_patches import reference
from simmim_kernels.merge_patches.arguments import MergeParameters, Statistics
from simmim_kernels.op import Op, gradients_like

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
    cast = of_kernels(parameters, chosen, x.dtype)
    return _merge(chosen, x, MergeParameters(*cast), eps).out


class Merged(NamedTuple):
    """The output [B, H/2, W/2, M], and what is kept."""

    out: Tensor
    norm: Statistics


def _shapes(x: Tensor, parameters: MergeParameters, eps: float) -> Merged:
    B, H, W, _ = x.shape
    per_row = x.new_empty((B * (H // 2) * (W // 2),), dtype=torch.float32)
    out = x.new_empty((B, H // 2, W // 2, parameters.weight.shape[0]))
    return Merged(out, Statistics(per_row, torch.empty_like(per_row)))


def _gradient_shapes(
    grad_out: Tensor, x: Tensor, parameters: MergeParameters, norm: Statistics, of_parameters: bool
) -> list[Tensor | None]:
    return gradients_like(x, *parameters, of_parameters=of_parameters)


_merge = Op("merge_patches", _shapes, _gradient_shapes, gradients=("x", "parameters"))
