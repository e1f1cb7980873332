"""Transformer blocks on the CPU: PyTorch's matrix products, C++ passes over rows between them.

T tokens, C width, M hidden width. Activations are kept in their own dtype; what goes into and
comes out of products has the dtype of the weights, which is float32 where the processor has no
16-bit products. All large buffers are recycled: a fresh one costs more than the pass that fills it.
"""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.native import address, converted, multiply, rows_and_dtypes
from simmim_kernels.window_attention import native_kernel as window_attention


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, and for the backward: qkv (without its bias), attended values, log_sums, mean, rstd."""
    y, mean, rstd = _layer_norm(x, norm_weight, norm_bias, qkv_weight.dtype, eps)
    product = multiply(y, qkv_weight.t())
    qkv = converted(product, x.dtype).view(*x.shape[:-1], len(qkv_weight))
    attended, log_sums = window_attention.forward(
        qkv, bias, num_heads, window, shift, scale, qkv_bias
    )
    branch = multiply(converted(attended, proj_weight.dtype).view(y.shape), proj_weight.t(), out=y)
    out = _add_branch(x, branch, proj_bias, gamma, branch_scale)
    return out, qkv, attended, log_sums, mean, rstd


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
    """Gradients of x and of the eight parameters."""
    dtype = qkv_weight.dtype
    grad_branch, column_sum = _branch_gradient(grad_out, branch_scale, dtype, of_parameters)
    grad_proj = (
        _projection_gradient(grad_branch, attended, proj_weight, proj_bias, gamma, column_sum)
        if of_parameters
        else _nothing(3)
    )
    grad_attended = multiply(grad_branch, _scaled_rows(proj_weight, gamma))
    grad_qkv, grad_qkv_bias, grad_bias, _ = window_attention.backward_with_bias(
        grad_attended.view(attended.shape),
        qkv,
        qkv_bias,
        bias,
        log_sums,
        num_heads,
        window,
        shift,
        scale,
        of_parameters,
    )
    grad_qkv = grad_qkv.view(len(grad_branch), qkv.shape[-1])
    grad_y = multiply(grad_qkv, qkv_weight, out=grad_attended)
    grad_x, y, of_norm = _layer_norm_gradient(
        x, grad_out, norm_weight, norm_bias, mean, rstd, grad_y, of_parameters
    )
    grad_qkv_weight = multiply(grad_qkv.t(), y) if of_parameters else _nothing(1)[0]
    grad_proj_weight, grad_proj_bias, grad_gamma = grad_proj
    return (
        grad_x,
        *of_norm,
        grad_qkv_weight,
        grad_qkv_bias,
        grad_bias,
        grad_proj_weight,
        grad_proj_bias,
        grad_gamma,
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and for the backward: the output of fc1 without its bias [T, M], mean, rstd."""
    assert native.extension is not None
    y, mean, rstd = _layer_norm(x, norm_weight, norm_bias, fc1_weight.dtype, eps)
    product = multiply(y, fc1_weight.t())
    hidden = product if product.dtype == x.dtype else native.empty(product.shape, x.dtype)
    activated = native.empty(product.shape, product.dtype)
    native.extension.gelu_forward(
        rows_and_dtypes(product, x.dtype),
        product.data_ptr(),
        fc1_bias.data_ptr(),
        0 if hidden is product else hidden.data_ptr(),
        activated.data_ptr(),
    )
    branch = multiply(activated, fc2_weight.t(), out=y)
    return _add_branch(x, branch, fc2_bias, gamma, branch_scale), hidden, mean, rstd


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
    """Gradients of x and of the seven parameters."""
    assert native.extension is not None
    grad_branch, column_sum = _branch_gradient(
        grad_out, branch_scale, fc2_weight.dtype, of_parameters
    )
    grad = multiply(grad_branch, _scaled_rows(fc2_weight, gamma))
    activated = native.empty(grad.shape, grad.dtype)
    grad_fc1_bias = torch.zeros(len(fc1_bias) if of_parameters else 0)
    native.extension.gelu_backward(
        rows_and_dtypes(grad, x.dtype),
        hidden.data_ptr(),
        fc1_bias.data_ptr(),
        grad.data_ptr(),
        activated.data_ptr(),
        grad_fc1_bias.data_ptr(),
    )
    grad_fc2 = (
        _projection_gradient(grad_branch, activated, fc2_weight, fc2_bias, gamma, column_sum)
        if of_parameters
        else _nothing(3)
    )
    del activated
    grad_y = multiply(grad, fc1_weight)
    grad_x, y, of_norm = _layer_norm_gradient(
        x, grad_out, norm_weight, norm_bias, mean, rstd, grad_y, of_parameters
    )
    grad_fc1_weight = multiply(grad.t(), y) if of_parameters else _nothing(1)[0]
    return grad_x, *of_norm, grad_fc1_weight, grad_fc1_bias, *grad_fc2


def _nothing(count: int) -> list[Tensor]:
    return [torch.zeros(0) for _ in range(count)]


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, C] in `dtype`, mean and rstd [T]."""
    assert native.extension is not None
    C = x.shape[-1]
    y = native.empty((x.numel() // C, C), dtype)
    mean, rstd = torch.empty(len(y)), torch.empty(len(y))
    native.extension.layer_norm_forward(
        rows_and_dtypes(y, x.dtype),
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    return y, mean, rstd


def _layer_norm_gradient(
    x: Tensor,
    grad_out: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradient of x, the past `grad_out` included; y, which overwrites grad_y; weight and bias."""
    assert native.extension is not None
    grad_x = native.empty(x.shape, x.dtype)
    of_norm = [torch.zeros(x.shape[-1] if of_parameters else 0) for _ in range(2)]
    native.extension.layer_norm_backward(
        rows_and_dtypes(grad_y, x.dtype),
        x.data_ptr(),
        grad_out.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_y.data_ptr(),
        grad_x.data_ptr(),
        of_norm[0].data_ptr(),
        of_norm[1].data_ptr(),
    )
    return grad_x, grad_y, of_norm


def _add_branch(
    x: Tensor,
    product: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
) -> Tensor:
    assert native.extension is not None
    out = native.empty(x.shape, x.dtype)
    native.extension.residual_forward(
        rows_and_dtypes(product, x.dtype),
        x.data_ptr(),
        product.data_ptr(),
        bias.data_ptr(),
        address(gamma),
        address(branch_scale),
        max(1, len(product) // max(1, len(x))),
        out.data_ptr(),
    )
    return out


def _branch_gradient(
    grad_out: Tensor, branch_scale: Tensor | None, dtype: torch.dtype, of_parameters: bool
) -> tuple[Tensor, Tensor]:
    """branch_scale · grad_out as [T, C] in the products' dtype, and its sum over tokens."""
    assert native.extension is not None
    C = grad_out.shape[-1]
    same = branch_scale is None and grad_out.dtype == dtype
    flat = grad_out.view(grad_out.numel() // C, C)
    grad = flat if same else native.empty(flat.shape, dtype)
    total = torch.zeros(C if of_parameters else 0)
    if of_parameters or not same:
        native.extension.residual_backward(
            rows_and_dtypes(grad, grad_out.dtype),
            grad_out.data_ptr(),
            address(branch_scale),
            max(1, len(flat) // max(1, len(grad_out))),
            0 if same else grad.data_ptr(),
            total.data_ptr(),
        )
    return grad, total


def _scaled_rows(weight: Tensor, gamma: Tensor | None) -> Tensor:
    """LayerScale moved into the weight that comes before it: smaller than the activations."""
    return weight if gamma is None else (gamma.unsqueeze(1) * weight).to(weight.dtype)


def _projection_gradient(
    grad_branch: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    column_sum: Tensor,
) -> list[Tensor]:
    """Gradients of weight, bias and gamma of gamma · (inputs · weightᵀ + bias).

    That of gamma is a sum over tokens of grad · (W·input + b), which needs no branch: it is the
    weight times the product that makes the weight's own gradient.
    """
    assert native.extension is not None
    inputs = converted(inputs, grad_branch.dtype).view(len(grad_branch), inputs.shape[-1])
    grad_weight = multiply(grad_branch.t(), inputs)
    if gamma is None:
        return [grad_weight, column_sum, torch.zeros(0)]
    dot = torch.empty(len(weight))
    scaled, widened = grad_weight.float(), weight.float()
    native.extension.layer_scale_backward(
        *weight.shape,
        widened.data_ptr(),
        gamma.data_ptr(),
        scaled.data_ptr(),
        dot.data_ptr(),
        torch.get_num_threads(),
    )
    return [scaled.to(weight.dtype), gamma * column_sum, dot + bias * column_sum]
