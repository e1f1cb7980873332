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
from simmim_kernels.transformer_block.triton_rows import product
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
    qkv = product(y, p.qkv_weight.t(), p.qkv_bias)
    del y
    attention = _attend(qkv, x, p, windows)
    out = product(_rows(attention.attended), p.proj_weight.t())
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
    folded, unit = _fold(p.gamma, p.proj_weight)
    grad_qkv, *of_attention = _attention_gradient(
        product(grad_branch, folded), attention, p, windows, of_parameters
    )
    grad_y = product(grad_qkv, p.qkv_weight)
    grad_x, y, *of_norm, branch_sum = _norm_gradient(
        grad_rows, grad_y, x, p, norm, branch_scale, unit, of_parameters
    )
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    of_qkv = product(grad_qkv.t(), y), _bias_gradient(p.qkv_bias, grad_qkv), *of_attention
    of_weight = product(grad_branch.t(), _rows(attention.attended))
    of_proj = _layer_scale_backward(of_weight, branch_sum, p.gamma, p.proj_weight, p.proj_bias)
    return grad_x, *of_norm, *_with_unit(unit, *of_qkv), *of_proj


def post_norm_attention_forward(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> tuple[Tensor, Attended, NormalisedBranch]:
    """The output and what is kept; all inputs contiguous."""
    p, rows = parameters, _rows(x)
    attention = _attend(product(rows, p.qkv_weight.t(), p.qkv_bias), x, p, windows)
    branch = product(_rows(attention.attended), p.proj_weight.t())
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
    grad_branch, grad_proj_bias, *of_norm = triton_norms.add_normalised_backward(
        grad_rows, *norm, p.proj_bias, p.norm_weight, branch_scale, of_parameters
    )
    grad_qkv, *of_attention = _attention_gradient(
        product(grad_branch, p.proj_weight), attention, p, windows, of_parameters
    )
    grad_x = _added(grad_rows, grad_qkv, p.qkv_weight).view(x.shape)
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    of_qkv = product(grad_qkv.t(), _rows(x)), _bias_gradient(p.qkv_bias, grad_qkv), *of_attention
    of_proj = product(grad_branch.t(), _rows(attention.attended)), grad_proj_bias, None
    return grad_x, *of_norm, *of_qkv, *of_proj


def residual_mlp_forward(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Statistics]:
    """The output, that of fc1 without its bias [T, M], mean and rstd; inputs contiguous."""
    p, rows = parameters, _rows(x)
    y, *norm = triton_norms.layer_norm(rows, p.norm_weight, p.norm_bias, eps)
    hidden = product(y, p.fc1_weight.t())
    del y
    out = product(triton_rows.gelu(hidden, p.fc1_bias), p.fc2_weight.t())
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
    folded, unit = _fold(p.gamma, p.fc2_weight)
    grad_hidden = product(grad_rows, folded)
    # both factors of the products below come with branch_scale, so grad_out stays as it is
    activated, grad_fc1_bias = triton_rows.gelu_backward(
        grad_hidden, hidden, p.fc1_bias, branch_scale, of_parameters
    )
    of_weight = product(grad_rows.t(), activated) if of_parameters else activated
    del activated
    grad_y = product(grad_hidden, p.fc1_weight)
    grad_x, y, *of_norm, branch_sum = _norm_gradient(
        grad_rows, grad_y, x, p, norm, branch_scale, unit, of_parameters
    )
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    of_fc1 = _with_unit(unit, product(grad_hidden.t(), y), grad_fc1_bias)
    of_fc2 = _layer_scale_backward(of_weight, branch_sum, p.gamma, p.fc2_weight, p.fc2_bias)
    return grad_x, *of_norm, *of_fc1, *of_fc2


def post_norm_mlp_forward(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, NormalisedBranch]:
    """The output, that of fc1 without its bias [T, M], and what was normalised."""
    p, rows = parameters, _rows(x)
    hidden = product(rows, p.fc1_weight.t())
    branch = product(triton_rows.gelu(hidden, p.fc1_bias), p.fc2_weight.t())
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
    grad_branch, grad_fc2_bias, *of_norm = triton_norms.add_normalised_backward(
        grad_rows, *norm, p.fc2_bias, p.norm_weight, branch_scale, of_parameters
    )
    grad_hidden = product(grad_branch, p.fc2_weight)
    activated, grad_fc1_bias = triton_rows.gelu_backward(
        grad_hidden, hidden, p.fc1_bias, None, of_parameters
    )
    grad_x = _added(grad_rows, grad_hidden, p.fc1_weight).view(x.shape)
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    of_fc1 = product(grad_hidden.t(), _rows(x)), grad_fc1_bias
    of_fc2 = product(grad_branch.t(), activated), grad_fc2_bias, None
    return grad_x, *of_norm, *of_fc1, *of_fc2


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv [T, 3C], of the factors and of the bias."""
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
    return _rows(grad_qkv), grad_factors, grad_bias


def _norm_gradient(
    grad_rows: Tensor,
    grad_y: Tensor,
    x: Tensor,
    parameters: AttentionParameters | MlpParameters,
    norm: Statistics,
    branch_scale: Tensor | None,
    unit: Tensor | None,
    of_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradient of x; y in the place of grad_y; gradients of weight and bias, and the branch's sum.

    All but the first are there with `of_parameters` only.
    """
    affine = parameters.norm_weight, parameters.norm_bias
    grad_x, *sums = triton_norms.layer_norm_backward(
        grad_rows, grad_y, _rows(x), *norm, *affine, branch_scale, unit, of_parameters
    )
    return grad_x.view(x.shape), grad_y, *sums


def _bias_gradient(bias: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if bias is None else triton_rows.column_sum(grad)


def _added(grad_out: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient that reaches x past the branch, and the one through its first product."""
    with torch.autocast(grad.device.type, enabled=False):
        return torch.addmm(grad_out, grad, weight)


def _fold(gamma: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """gamma · weight for the backward of `weight`'s product, so that no pass over tokens needs it.

    float16 cannot hold a weight times 1e-6, a usual gamma: there the factor misses max |gamma|,
    which is then the second tensor and has to come with everything that the gradient leads to.
    """
    if gamma is None:
        return weight, None
    unit = None
    if weight.dtype == torch.float16:
        unit = gamma.abs().amax().clamp(min=1e-30)
        gamma = gamma / unit
    return (gamma.unsqueeze(1) * weight).to(weight.dtype), unit


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
