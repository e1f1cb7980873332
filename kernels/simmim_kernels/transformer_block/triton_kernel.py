"""Transformer blocks on a GPU: matrix products by torch, row passes and attention in Triton.

B batch, H W token rows and columns, C width, M hidden width of the MLP, T = B·H·W. Gradients that
are not wanted are None.
"""

import torch
from torch import Tensor

from simmim_kernels.transformer_block import triton_norms, triton_rows
from simmim_kernels.transformer_block.arguments import (
    Attended,
    AttentionParameters,
    MlpParameters,
    NormalisedBranch,
    Statistics,
)
from simmim_kernels.transformer_block.triton_rows import (
    added,
    backward_product,
    forward_product,
    product,
    weight_gradient,
)
from simmim_kernels.weight_copies import in_dtype
from simmim_kernels.window_attention import triton_kernel as window_attention
from simmim_kernels.window_attention.arguments import Windows

Gradients = tuple[Tensor | None, ...]


def residual_attention_forward(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> tuple[Tensor, Attended, Statistics]:
    """The output and what is kept; all inputs contiguous."""
    p, rows = parameters, _rows(x)
    y, *norm = triton_norms.layer_norm(rows, p.norm_weight, p.norm_bias, eps)
    qkv = forward_product(y, p.qkv_weight, p.qkv_bias)
    del y
    attention = _attend(qkv, x, p, windows)
    out = forward_product(_rows(attention.attended), p.proj_weight)
    triton_rows.add_branch(out, rows, p.proj_bias, p.gamma, branch_scale)
    return out.view(x.shape), attention, Statistics(*norm)


def residual_attention_backward(
    grad_out: Tensor,
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    attention: Attended,
    norm: Statistics,
    windows: Windows,
    of_parameters: bool,
) -> Gradients:
    """Gradients of x and of the parameters."""
    p, grad_rows = parameters, _rows(grad_out)
    # the attention backward is linear in each image, but sums the gradient of its bias over them
    grad_branch = grad_rows
    if branch_scale is not None:
        grad_branch = triton_rows.scale_images(grad_rows, branch_scale)
    folded, unit = _fold(p.gamma, p.proj_weight, x.dtype)
    grad_qkv, of_attention, of_columns = _attention_gradient(
        product(grad_branch, folded), attention, p, windows, of_parameters
    )
    grad_y = backward_product(grad_qkv, p.qkv_weight)
    grad_x, y, of_norm = _norm_gradient(
        grad_rows, grad_y, x, p, norm, branch_scale, unit, of_parameters
    )
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    norm_weight, norm_bias, branch_sum, *qkv_bias = added(of_norm, of_columns)
    of_qkv = (
        weight_gradient(grad_qkv, y, p.qkv_weight),
        qkv_bias[0] if qkv_bias else None,
        *of_attention,
    )
    of_weight = weight_gradient(grad_branch, _rows(attention.attended), p.proj_weight)
    of_proj = _layer_scale_backward(of_weight, branch_sum, p.gamma, p.proj_weight, p.proj_bias)
    return grad_x, norm_weight, norm_bias, *_with_unit(unit, *of_qkv), *of_proj


def post_norm_attention_forward(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> tuple[Tensor, Attended, NormalisedBranch]:
    """The output and what is kept; all inputs contiguous."""
    p, rows = parameters, _rows(x)
    attention = _attend(forward_product(rows, p.qkv_weight, p.qkv_bias), x, p, windows)
    branch = forward_product(_rows(attention.attended), p.proj_weight)
    out, *norm = triton_norms.add_normalised(
        branch, rows, p.proj_bias, p.norm_weight, p.norm_bias, branch_scale, eps
    )
    return out.view(x.shape), attention, NormalisedBranch(branch, *norm)


def post_norm_attention_backward(
    grad_out: Tensor,
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    attention: Attended,
    norm: NormalisedBranch,
    windows: Windows,
    of_parameters: bool,
) -> Gradients:
    """Gradients of x and of the parameters."""
    p, grad_rows = parameters, _rows(grad_out)
    grad_branch, of_norm = triton_norms.add_normalised_backward(
        grad_rows, *norm, p.proj_bias, p.norm_weight, branch_scale, of_parameters
    )
    grad_qkv, of_attention, of_columns = _attention_gradient(
        backward_product(grad_branch, p.proj_weight), attention, p, windows, of_parameters
    )
    grad_x = _added(grad_rows, grad_qkv, p.qkv_weight).view(x.shape)
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    proj_bias, norm_weight, norm_bias, *qkv_bias = added(of_norm, of_columns)
    of_qkv = (
        weight_gradient(grad_qkv, _rows(x), p.qkv_weight),
        qkv_bias[0] if qkv_bias else None,
        *of_attention,
    )
    of_weight = weight_gradient(grad_branch, _rows(attention.attended), p.proj_weight)
    return grad_x, norm_weight, norm_bias, *of_qkv, of_weight, proj_bias, None


def residual_mlp_forward(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Statistics]:
    """The output, that of fc1 without its bias [T, M], mean and rstd; inputs contiguous."""
    p, rows = parameters, _rows(x)
    y, *norm = triton_norms.layer_norm(rows, p.norm_weight, p.norm_bias, eps)
    hidden = forward_product(y, p.fc1_weight)
    del y
    out = forward_product(triton_rows.gelu(hidden, p.fc1_bias), p.fc2_weight)
    triton_rows.add_branch(out, rows, p.fc2_bias, p.gamma, branch_scale)
    return out.view(x.shape), hidden, Statistics(*norm)


def residual_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    parameters: MlpParameters,
    branch_scale: Tensor | None,
    hidden: Tensor,
    norm: Statistics,
    of_parameters: bool,
) -> Gradients:
    """Gradients of x and of the parameters."""
    p, grad_rows = parameters, _rows(grad_out)
    folded, unit = _fold(p.gamma, p.fc2_weight, x.dtype)
    grad_hidden = product(grad_rows, folded)
    # both factors of the products below come with branch_scale, so grad_out stays as it is
    activated, of_fc1_bias = triton_rows.gelu_backward(
        grad_hidden, hidden, p.fc1_bias, branch_scale, of_parameters
    )
    of_weight = weight_gradient(grad_rows, activated, p.fc2_weight) if of_parameters else activated
    del activated
    grad_y = backward_product(grad_hidden, p.fc1_weight)
    grad_x, y, of_norm = _norm_gradient(
        grad_rows, grad_y, x, p, norm, branch_scale, unit, of_parameters
    )
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    norm_weight, norm_bias, branch_sum, fc1_bias = added(of_norm, of_fc1_bias)
    of_fc1 = _with_unit(unit, weight_gradient(grad_hidden, y, p.fc1_weight), fc1_bias)
    of_fc2 = _layer_scale_backward(of_weight, branch_sum, p.gamma, p.fc2_weight, p.fc2_bias)
    return grad_x, norm_weight, norm_bias, *of_fc1, *of_fc2


def post_norm_mlp_forward(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, NormalisedBranch]:
    """The output, that of fc1 without its bias [T, M], and what was normalised."""
    p, rows = parameters, _rows(x)
    hidden = forward_product(rows, p.fc1_weight)
    branch = forward_product(triton_rows.gelu(hidden, p.fc1_bias), p.fc2_weight)
    out, *norm = triton_norms.add_normalised(
        branch, rows, p.fc2_bias, p.norm_weight, p.norm_bias, branch_scale, eps
    )
    return out.view(x.shape), hidden, NormalisedBranch(branch, *norm)


def post_norm_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    parameters: MlpParameters,
    branch_scale: Tensor | None,
    hidden: Tensor,
    norm: NormalisedBranch,
    of_parameters: bool,
) -> Gradients:
    """Gradients of x and of the parameters."""
    p, grad_rows = parameters, _rows(grad_out)
    grad_branch, of_norm = triton_norms.add_normalised_backward(
        grad_rows, *norm, p.fc2_bias, p.norm_weight, branch_scale, of_parameters
    )
    grad_hidden = backward_product(grad_branch, p.fc2_weight)
    activated, of_fc1_bias = triton_rows.gelu_backward(
        grad_hidden, hidden, p.fc1_bias, None, of_parameters
    )
    grad_x = _added(grad_rows, grad_hidden, p.fc1_weight).view(x.shape)
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    fc2_bias, norm_weight, norm_bias, fc1_bias = added(of_norm, of_fc1_bias)
    of_fc1 = weight_gradient(grad_hidden, _rows(x), p.fc1_weight), fc1_bias
    of_fc2 = weight_gradient(grad_branch, activated, p.fc2_weight), fc2_bias, None
    return grad_x, norm_weight, norm_bias, *of_fc1, *of_fc2


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _attend(qkv: Tensor, x: Tensor, parameters: AttentionParameters, windows: Windows) -> Attended:
    qkv = qkv.view(*x.shape[:3], qkv.shape[1])
    return Attended(
        qkv, *window_attention.forward(qkv, parameters.bias, windows, parameters.factors)
    )


def _attention_gradient(
    grad_attended: Tensor,
    attention: Attended,
    parameters: AttentionParameters,
    windows: Windows,
    of_parameters: bool,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], Tensor | None]:
    """Gradients of qkv [T, 3C], and of factors and bias; partial sums of that of qkv's bias."""
    qkv, attended, log_sums = attention
    grad_qkv, grad_bias, grad_factors = window_attention.backward(
        grad_attended.view(attended.shape),
        qkv,
        parameters.bias,
        attended,
        log_sums,
        windows,
        of_parameters and parameters.bias is not None,
        parameters.factors,
    )
    rows, columns = _rows(grad_qkv), None
    if of_parameters and parameters.qkv_bias is not None:
        columns = triton_rows.column_partial(rows)
    return rows, (grad_factors, grad_bias), columns


def _norm_gradient(
    grad_rows: Tensor,
    grad_y: Tensor,
    x: Tensor,
    parameters: AttentionParameters | MlpParameters,
    norm: Statistics,
    branch_scale: Tensor | None,
    unit: Tensor | None,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x; y in the place of grad_y; partial sums of `layer_norm_backward`.

    All but the first are there with `of_parameters` only.
    """
    affine = parameters.norm_weight, parameters.norm_bias
    grad_x, partial = triton_norms.layer_norm_backward(
        grad_rows, grad_y, _rows(x), *norm, *affine, branch_scale, unit, of_parameters
    )
    return grad_x.view(x.shape), grad_y, partial


def _added(grad_out: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient that reaches x past the branch, and the one through its first product."""
    return torch.addmm(grad_out, grad, in_dtype(weight, grad.dtype))


def _fold(gamma: Tensor | None, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """gamma · weight in `dtype`, for the backward of its product: no pass over tokens needs gamma.

    float16 cannot hold a weight times 1e-6, a usual gamma: there the factor misses max |gamma|,
    which is then the second tensor and has to come with everything that the gradient leads to.
    """
    if gamma is None:
        return in_dtype(weight, dtype), None
    unit = None
    if dtype == torch.float16:
        unit = gamma.abs().amax().clamp(min=1e-30)
        gamma = gamma / unit
    return (gamma.unsqueeze(1) * weight).to(dtype), unit


def _with_unit(unit: Tensor | None, *grads: Tensor | None) -> Gradients:
    return grads if unit is None else tuple(None if g is None else g * unit for g in grads)


def _layer_scale_backward(
    product: Tensor, branch_sum: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor
) -> Gradients:
    """Gradients of weight, bias and gamma.

    With g the gradient of gamma · (a · weightᵀ + bias) for every token, `product` is gᵀ · a and
    `branch_sum` the sum of g. gamma's own, Σ g · (a · weightᵀ + bias), follows from them: the
    branch's output itself is not kept.
    """
    if gamma is None:
        return product, branch_sum, None
    wide = product.float()
    grad_gamma = (wide * weight).sum(1) + branch_sum * bias
    return (wide * gamma.unsqueeze(1)).to(weight.dtype), branch_sum * gamma, grad_gamma
