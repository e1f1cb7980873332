"""Post-norm branches on a GPU: matrix products by torch, row passes and attention in Triton.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, T = B·H·W.
"""

import torch
from torch import Tensor

from simmim_kernels.post_norm_block.triton_rows import add_normalised, add_normalised_backward
from simmim_kernels.transformer_block import triton_rows
from simmim_kernels.window_attention import triton_kernel as window_attention


def attention_forward(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    factors: Tensor,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    eps: float,
) -> tuple[Tensor, ...]:
    """The output, qkv, attended values, log_sums, the branch without its bias, mean and rstd."""
    rows = _rows(x)
    qkv = triton_rows.product(rows, qkv_weight.t(), qkv_bias)
    qkv = qkv.view(*x.shape[:3], len(qkv_weight))
    attended, log_sums = window_attention.forward(qkv, bias, num_heads, window, shift, 1.0, factors)
    branch = triton_rows.product(_rows(attended), proj_weight.t())
    out, mean, rstd = add_normalised(
        branch, rows, proj_bias, norm_weight, norm_bias, branch_scale, eps
    )
    return out.view(x.shape), qkv, attended, log_sums, branch, mean, rstd


def attention_backward(
    grad_out: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    factors: Tensor,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    qkv: Tensor,
    attended: Tensor,
    log_sums: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    of_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the eight parameters; [0] where it is not wanted."""
    grad_rows = _rows(grad_out)
    grad_branch, grad_proj_bias, *grad_norm = add_normalised_backward(
        grad_rows, branch, mean, rstd, proj_bias, norm_weight, branch_scale, of_parameters
    )
    grad_attended = triton_rows.product(grad_branch, proj_weight).view(x.shape)
    of_bias = of_parameters and bias is not None
    grad_qkv, grad_bias, grad_factors = window_attention.backward(
        grad_attended,
        qkv,
        bias,
        attended,
        log_sums,
        num_heads,
        window,
        shift,
        1.0,
        of_bias,
        factors,
    )
    del grad_attended
    grad_qkv = _rows(grad_qkv)
    grad_x = _added(grad_rows, grad_qkv, qkv_weight).view(x.shape)
    if not of_parameters:
        return grad_x, *triton_rows.nothing(x, 8)
    none = triton_rows.nothing(x, 1)
    return (
        grad_x,
        triton_rows.product(grad_qkv.t(), _rows(x)),
        none[0] if qkv_bias is None else triton_rows.column_sum(grad_qkv),
        grad_factors,
        grad_bias,
        triton_rows.product(grad_branch.t(), _rows(attended)),
        grad_proj_bias,
        *grad_norm,
    )


def mlp_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The output, the outputs of fc1 and fc2 without their biases, mean and rstd."""
    rows = _rows(x)
    hidden = triton_rows.product(rows, fc1_weight.t())
    branch = triton_rows.product(triton_rows.gelu(hidden, fc1_bias), fc2_weight.t())
    out, mean, rstd = add_normalised(
        branch, rows, fc2_bias, norm_weight, norm_bias, branch_scale, eps
    )
    return out.view(x.shape), hidden, branch, mean, rstd


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    hidden: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    of_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the six parameters; [0] where it is not wanted."""
    grad_rows = _rows(grad_out)
    grad_branch, grad_fc2_bias, *grad_norm = add_normalised_backward(
        grad_rows, branch, mean, rstd, fc2_bias, norm_weight, branch_scale, of_parameters
    )
    grad_hidden = triton_rows.product(grad_branch, fc2_weight)
    activated, grad_fc1_bias = triton_rows.gelu_backward(
        grad_hidden, hidden, fc1_bias, None, of_parameters
    )
    grad_x = _added(grad_rows, grad_hidden, fc1_weight).view(x.shape)
    if not of_parameters:
        return grad_x, *triton_rows.nothing(x, 6)
    return (
        grad_x,
        triton_rows.product(grad_hidden.t(), _rows(x)),
        grad_fc1_bias,
        triton_rows.product(grad_branch.t(), activated),
        grad_fc2_bias,
        *grad_norm,
    )


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _added(grad_out: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient that reaches x past the branch, and the one through its first product."""
    with torch.autocast(grad.device.type, enabled=False):
        return torch.addmm(grad_out, grad, weight)
