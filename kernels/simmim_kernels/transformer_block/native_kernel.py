"""Transformer blocks on the CPU: PyTorch's matrix products, C++ passes over rows between them.

T tokens, C width, M hidden width. Activations are kept in their own dtype; what goes into and
comes out of products has the dtype of the weights, which is float32 where the processor has no
16-bit products. All large buffers are recycled: a fresh one costs more than the pass that fills it.
"""

from torch import Tensor

from simmim_kernels.native import converted, multiply
from simmim_kernels.transformer_block import native_rows
from simmim_kernels.transformer_block.arguments import (
    Attended,
    AttentionParameters,
    MlpParameters,
    NormalisedBranch,
    Statistics,
)
from simmim_kernels.window_attention import native_kernel as window_attention
from simmim_kernels.window_attention.arguments import Windows

Gradients = tuple[Tensor | AttentionParameters | MlpParameters | None, ...]


def residual_attention_forward(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> tuple[Tensor, Attended, Statistics]:
    """The output and what is kept; qkv is without its bias."""
    p = parameters
    y, norm = native_rows.layer_norm(x, p, p.qkv_weight.dtype, eps)
    attention = _attend(multiply(y, p.qkv_weight.t()), x, p, windows)
    branch = multiply(
        native_rows.rows(attention.attended, p.proj_weight.dtype), p.proj_weight.t(), out=y
    )
    return native_rows.add_branch(x, branch, p.proj_bias, p.gamma, branch_scale), attention, norm


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
    p, dtype = parameters, parameters.qkv_weight.dtype
    grad_branch, column_sum = native_rows.branch_gradient(
        grad_out, branch_scale, dtype, of_parameters
    )
    of_proj: list[Tensor | None] = [None] * 3
    if of_parameters:
        of_proj = native_rows.projection_gradient(
            grad_branch, attention.attended, p.proj_weight, p.proj_bias, p.gamma, column_sum
        )
    grad_attended = multiply(grad_branch, native_rows.scaled_rows(p.proj_weight, p.gamma))
    grad_qkv, *of_attention = _attention_gradient(
        grad_attended, attention, p, windows, of_parameters
    )
    grad_y = multiply(grad_qkv, p.qkv_weight, out=grad_attended)
    grad_x, y, of_norm = native_rows.layer_norm_gradient(
        x, grad_out, p, norm, grad_y, of_parameters
    )
    grad_qkv_weight = multiply(grad_qkv.t(), y) if of_parameters else None
    return grad_x, *of_norm, grad_qkv_weight, *of_attention, *of_proj


def post_norm_attention_forward(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
) -> tuple[Tensor, Attended, NormalisedBranch]:
    """The output and what is kept; qkv is without its bias."""
    p = parameters
    product = multiply(native_rows.rows(x, p.qkv_weight.dtype), p.qkv_weight.t())
    attention = _attend(product, x, p, windows)
    branch = multiply(native_rows.rows(attention.attended, p.proj_weight.dtype), p.proj_weight.t())
    out, norm = native_rows.add_normalised(x, branch, p.proj_bias, p, branch_scale, eps)
    return out, attention, norm


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
    p, dtype = parameters, parameters.qkv_weight.dtype
    grad_branch, grad_proj_bias, *of_norm = native_rows.add_normalised_gradient(
        grad_out, norm, p.proj_bias, p.norm_weight, branch_scale, dtype, of_parameters
    )
    grad_attended = multiply(grad_branch, p.proj_weight)
    grad_qkv, *of_attention = _attention_gradient(
        grad_attended, attention, p, windows, of_parameters
    )
    grad_x = native_rows.add_gradients(
        grad_out, multiply(grad_qkv, p.qkv_weight, out=grad_attended)
    )
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    grad_proj_weight = multiply(grad_branch.t(), native_rows.rows(attention.attended, dtype))
    grad_qkv_weight = multiply(grad_qkv.t(), native_rows.rows(x, dtype))
    of_proj = grad_proj_weight, grad_proj_bias, None
    return grad_x, *of_norm, grad_qkv_weight, *of_attention, *of_proj


def residual_mlp_forward(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Statistics]:
    """The output, that of fc1 without its bias [T, M], and mean and rstd."""
    p = parameters
    y, norm = native_rows.layer_norm(x, p, p.fc1_weight.dtype, eps)
    hidden, activated = native_rows.gelu(multiply(y, p.fc1_weight.t()), p.fc1_bias, x.dtype)
    branch = multiply(activated, p.fc2_weight.t(), out=y)
    return native_rows.add_branch(x, branch, p.fc2_bias, p.gamma, branch_scale), hidden, norm


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
    p, dtype = parameters, parameters.fc2_weight.dtype
    grad_branch, column_sum = native_rows.branch_gradient(
        grad_out, branch_scale, dtype, of_parameters
    )
    grad = multiply(grad_branch, native_rows.scaled_rows(p.fc2_weight, p.gamma))
    activated, grad_fc1_bias = native_rows.gelu_gradient(
        grad, hidden, p.fc1_bias, x.dtype, of_parameters
    )
    of_fc2: list[Tensor | None] = [None] * 3
    if of_parameters:
        of_fc2 = native_rows.projection_gradient(
            grad_branch, activated, p.fc2_weight, p.fc2_bias, p.gamma, column_sum
        )
    del activated
    grad_y = multiply(grad, p.fc1_weight)
    grad_x, y, of_norm = native_rows.layer_norm_gradient(
        x, grad_out, p, norm, grad_y, of_parameters
    )
    grad_fc1_weight = multiply(grad.t(), y) if of_parameters else None
    return grad_x, *of_norm, grad_fc1_weight, grad_fc1_bias, *of_fc2


def post_norm_mlp_forward(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, NormalisedBranch]:
    """The output, that of fc1 without its bias [T, M], and what was normalised."""
    p = parameters
    product = multiply(native_rows.rows(x, p.fc1_weight.dtype), p.fc1_weight.t())
    hidden, activated = native_rows.gelu(product, p.fc1_bias, x.dtype)
    branch = multiply(activated, p.fc2_weight.t())
    out, norm = native_rows.add_normalised(x, branch, p.fc2_bias, p, branch_scale, eps)
    return out, hidden, norm


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
    p, dtype = parameters, parameters.fc1_weight.dtype
    grad_branch, grad_fc2_bias, *of_norm = native_rows.add_normalised_gradient(
        grad_out, norm, p.fc2_bias, p.norm_weight, branch_scale, dtype, of_parameters
    )
    grad = multiply(grad_branch, p.fc2_weight)
    activated, grad_fc1_bias = native_rows.gelu_gradient(
        grad, hidden, p.fc1_bias, x.dtype, of_parameters
    )
    grad_fc2_weight = multiply(grad_branch.t(), activated) if of_parameters else None
    del activated
    grad_x = native_rows.add_gradients(grad_out, multiply(grad, p.fc1_weight, out=grad_branch))
    if not of_parameters:
        return grad_x, *(None,) * len(p)
    grad_fc1_weight = multiply(grad.t(), native_rows.rows(x, dtype))
    of_fc2 = grad_fc2_weight, grad_fc2_bias, None
    return grad_x, *of_norm, grad_fc1_weight, grad_fc1_bias, *of_fc2


def _attend(
    product: Tensor, x: Tensor, parameters: AttentionParameters, windows: Windows
) -> Attended:
    """Attention by the product of x and the weight of qkv."""
    p = parameters
    qkv = converted(product, x.dtype).view(*x.shape[:-1], len(p.qkv_weight))
    out, log_sums = window_attention.forward(qkv, p.bias, windows, p.qkv_bias, p.factors)
    return Attended(qkv, out, log_sums)


def _attention_gradient(
    grad_attended: Tensor,
    attention: Attended,
    parameters: AttentionParameters,
    windows: Windows,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv [T, 3C], and of qkv_bias, factors and bias."""
    p, qkv = parameters, attention.qkv
    grad_qkv, grad_qkv_bias, grad_bias, grad_factors = window_attention.backward_with_bias(
        grad_attended.view(attention.attended.shape),
        qkv,
        p.qkv_bias,
        p.bias,
        attention.log_sums,
        windows,
        of_parameters,
        p.factors,
    )
    return grad_qkv.view(len(grad_attended), qkv.shape[-1]), grad_qkv_bias, grad_factors, grad_bias
