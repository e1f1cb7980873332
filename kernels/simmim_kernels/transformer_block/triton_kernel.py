"""The residual branches on a GPU: matrix products by torch, row passes and attention in Triton.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, T = B·H·W.
"""

import torch
from torch import Tensor

from simmim_kernels.transformer_block import triton_rows
from simmim_kernels.window_attention import triton_kernel as window_attention


def attention_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """The output, qkv, the attended values, log_sums, mean and rstd; all inputs contiguous."""
    B, H, W, C = x.shape
    rows = x.view(B * H * W, C)
    y, mean, rstd = triton_rows.layer_norm(rows, norm_weight, norm_bias, eps)
    qkv = triton_rows.product(y, qkv_weight.t(), qkv_bias).view(B, H, W, 3 * C)
    del y
    attended, log_sums = window_attention.forward(qkv, bias, num_heads, window, shift, scale)
    out = triton_rows.product(attended.view(rows.shape), proj_weight.t())
    triton_rows.add_branch(out, rows, proj_bias, gamma, branch_scale)
    return out.view(x.shape), qkv, attended, log_sums, mean, rstd


def attention_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
    qkv: Tensor,
    attended: Tensor,
    log_sums: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    of_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the eight parameters up to gamma; [0] where it is not wanted."""
    rows = x.view(mean.numel(), x.shape[3])
    grad_rows = grad_out.view(rows.shape)
    # the attention backward is linear in each image, but sums the gradient of its bias over them
    grad_branch = grad_rows
    if branch_scale is not None:
        grad_branch = triton_rows.scale_images(grad_rows, branch_scale)
    folded, unit = _fold(gamma, proj_weight)
    grad_attended = triton_rows.product(grad_branch, folded).view(x.shape)
    of_bias = of_parameters and bias is not None
    grad_qkv, grad_bias, _ = window_attention.backward(
        grad_attended, qkv, bias, attended, log_sums, num_heads, window, shift, scale, of_bias
    )
    del grad_attended
    grad_qkv = grad_qkv.view(-1, qkv.shape[3])
    dy = triton_rows.product(grad_qkv, qkv_weight)
    dx, *grad_norm, branch_sum = triton_rows.layer_norm_backward(
        grad_rows, dy, rows, mean, rstd, norm_weight, norm_bias, branch_scale, unit, of_parameters
    )
    if not of_parameters:
        return dx.view(x.shape), *triton_rows.nothing(x, 8)
    y = dy  # whose place it took
    grad_qkv_weight = triton_rows.product(grad_qkv.t(), y)
    none = triton_rows.nothing(x, 1)
    grad_qkv_bias = none[0] if qkv_bias is None else triton_rows.column_sum(grad_qkv)
    product = triton_rows.product(grad_branch.t(), attended.view(rows.shape))
    grads = _with_unit(unit, grad_qkv_weight, grad_qkv_bias, grad_bias)
    last = _layer_scale_backward(product, branch_sum, gamma, proj_weight, proj_bias)
    return dx.view(x.shape), *grad_norm, *grads, *last


def mlp_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The output, the output of fc1 without its bias [T, M], mean and rstd; inputs contiguous."""
    rows = _rows(x)
    y, mean, rstd = triton_rows.layer_norm(rows, norm_weight, norm_bias, eps)
    hidden = triton_rows.product(y, fc1_weight.t())
    del y
    out = triton_rows.product(triton_rows.gelu(hidden, fc1_bias), fc2_weight.t())
    triton_rows.add_branch(out, rows, fc2_bias, gamma, branch_scale)
    return out.view(x.shape), hidden, mean, rstd


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    of_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the seven parameters up to gamma; [0] where it is not wanted."""
    rows, grad_rows = _rows(x), _rows(grad_out)
    folded, unit = _fold(gamma, fc2_weight)
    grad_hidden = triton_rows.product(grad_rows, folded)
    # both factors of the products below come with branch_scale, so grad_out stays as it is
    activated, grad_fc1_bias = triton_rows.gelu_backward(
        grad_hidden, hidden, fc1_bias, branch_scale, of_parameters
    )
    product = triton_rows.product(grad_rows.t(), activated) if of_parameters else activated
    del activated
    dy = triton_rows.product(grad_hidden, fc1_weight)
    dx, *grad_norm, branch_sum = triton_rows.layer_norm_backward(
        grad_rows, dy, rows, mean, rstd, norm_weight, norm_bias, branch_scale, unit, of_parameters
    )
    if not of_parameters:
        return dx.view(x.shape), *triton_rows.nothing(x, 7)
    y = dy  # whose place it took
    grads = _with_unit(unit, triton_rows.product(grad_hidden.t(), y), grad_fc1_bias)
    last = _layer_scale_backward(product, branch_sum, gamma, fc2_weight, fc2_bias)
    return dx.view(x.shape), *grad_norm, *grads, *last


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


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


def _with_unit(unit: Tensor | None, *grads: Tensor) -> list[Tensor]:
    return list(grads) if unit is None else [grad * unit for grad in grads]


def _layer_scale_backward(
    product: Tensor, branch_sum: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and gamma.

    With g the gradient of gamma · (a · weightᵀ + bias) for every token, `product` is gᵀ · a and
    `branch_sum` the sum of g. gamma's own, Σ g · (a · weightᵀ + bias), follows from them: the
    branch's output itself is not kept.
    """
    if gamma is None:
        return product, branch_sum, bias.new_empty(0)
    wide = product.float()
    grad_gamma = (wide * weight).sum(1) + branch_sum * bias
    return (wide * gamma.unsqueeze(1)).to(weight.dtype), branch_sum * gamma, grad_gamma
