"""Post-norm branches on the CPU: PyTorch's matrix products, C++ passes over rows between them.

T tokens, C width, M hidden width. Dtypes and memory are as in the blocks that normalise first
(transformer_block/native_kernel.py).
"""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.native import address, converted, multiply, rows_and_dtypes
from simmim_kernels.window_attention import native_kernel as window_attention


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
    """out, and for the backward: qkv and the branch (both without bias), and what lies between."""
    product = multiply(_rows(x, qkv_weight.dtype), qkv_weight.t())
    qkv = converted(product, x.dtype).view(*x.shape[:-1], len(qkv_weight))
    attended, log_sums = window_attention.forward(
        qkv, bias, num_heads, window, shift, 1.0, qkv_bias, factors
    )
    branch = multiply(_rows(attended, proj_weight.dtype), proj_weight.t())
    out, *kept = _add_normalised(x, branch, proj_bias, norm_weight, norm_bias, branch_scale, eps)
    return out, qkv, attended, log_sums, *kept


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
    """Gradients of x and of the eight parameters."""
    dtype = qkv_weight.dtype
    grad_branch, grad_proj_bias, *grad_norm = _through_norm(
        grad_out, branch, proj_bias, norm_weight, mean, rstd, branch_scale, dtype, of_parameters
    )
    grad_attended = multiply(grad_branch, proj_weight).view(attended.shape)
    grad_qkv, grad_qkv_bias, grad_bias, grad_factors = window_attention.backward_with_bias(
        grad_attended,
        qkv,
        qkv_bias,
        bias,
        log_sums,
        num_heads,
        window,
        shift,
        1.0,
        of_parameters,
        factors,
    )
    grad_qkv = grad_qkv.view(len(grad_branch), qkv.shape[-1])
    grad_x = _added(grad_out, multiply(grad_qkv, qkv_weight, out=grad_attended.view(branch.shape)))
    if not of_parameters:
        return grad_x, *_nothing(8)
    grad_proj_weight = multiply(grad_branch.t(), _rows(attended, dtype))
    grad_qkv_weight = multiply(grad_qkv.t(), _rows(x, dtype))
    of_attention = grad_qkv_weight, grad_qkv_bias, grad_factors, grad_bias
    return grad_x, *of_attention, grad_proj_weight, grad_proj_bias, *grad_norm


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
    """out, and for the backward: outputs of fc1 and fc2 without bias, mean and rstd."""
    assert native.extension is not None
    product = multiply(_rows(x, fc1_weight.dtype), fc1_weight.t())
    hidden = product if product.dtype == x.dtype else native.empty(product.shape, x.dtype)
    activated = native.empty(product.shape, product.dtype)
    native.extension.gelu_forward(
        rows_and_dtypes(product, x.dtype),
        product.data_ptr(),
        fc1_bias.data_ptr(),
        0 if hidden is product else hidden.data_ptr(),
        activated.data_ptr(),
    )
    branch = multiply(activated, fc2_weight.t())
    out, *kept = _add_normalised(x, branch, fc2_bias, norm_weight, norm_bias, branch_scale, eps)
    return out, hidden, *kept


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
    """Gradients of x and of the six parameters."""
    assert native.extension is not None
    dtype = fc1_weight.dtype
    grad_branch, grad_fc2_bias, *grad_norm = _through_norm(
        grad_out, branch, fc2_bias, norm_weight, mean, rstd, branch_scale, dtype, of_parameters
    )
    grad = multiply(grad_branch, fc2_weight)
    activated = native.empty(grad.shape, dtype)
    grad_fc1_bias = torch.zeros(len(fc1_bias) if of_parameters else 0)
    native.extension.gelu_backward(
        rows_and_dtypes(grad, x.dtype),
        hidden.data_ptr(),
        fc1_bias.data_ptr(),
        grad.data_ptr(),
        activated.data_ptr(),
        grad_fc1_bias.data_ptr(),
    )
    grad_fc2_weight = multiply(grad_branch.t(), activated) if of_parameters else activated
    del activated
    grad_x = _added(grad_out, multiply(grad, fc1_weight, out=grad_branch))
    if not of_parameters:
        return grad_x, *_nothing(6)
    grad_fc1_weight = multiply(grad.t(), _rows(x, dtype))
    return grad_x, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias, *grad_norm


def _nothing(count: int) -> list[Tensor]:
    return [torch.zeros(0) for _ in range(count)]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, C] in `dtype`."""
    return converted(x, dtype).view(x.numel() // x.shape[-1], x.shape[-1])


def _rows_per_image(rows: int, images: Tensor) -> int:
    return max(1, rows // max(1, len(images)))


def _add_normalised(
    x: Tensor,
    branch: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + branch_scale · norm(branch + bias), the branch in the dtype of x, mean and rstd [T]."""
    assert native.extension is not None
    out = native.empty(x.shape, x.dtype)
    kept = branch if branch.dtype == x.dtype else native.empty(branch.shape, x.dtype)
    mean, rstd = torch.empty(len(branch)), torch.empty(len(branch))
    native.extension.post_norm_forward(
        rows_and_dtypes(branch, x.dtype),
        x.data_ptr(),
        branch.data_ptr(),
        bias.data_ptr(),
        norm_weight.data_ptr(),
        norm_bias.data_ptr(),
        eps,
        address(branch_scale),
        _rows_per_image(len(branch), x),
        0 if kept is branch else kept.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        out.data_ptr(),
    )
    return out, kept, mean, rstd


def _through_norm(
    grad_out: Tensor,
    branch: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_scale: Tensor | None,
    dtype: torch.dtype,
    of_parameters: bool,
) -> list[Tensor]:
    """Gradients of the branch, [T, C] in `dtype`, of its bias and of the norm's weight and bias."""
    assert native.extension is not None
    grad = native.empty(branch.shape, dtype)
    sums = [torch.zeros(len(bias) if of_parameters else 0) for _ in range(3)]
    native.extension.post_norm_backward(
        rows_and_dtypes(grad, grad_out.dtype),
        grad_out.data_ptr(),
        branch.data_ptr(),
        bias.data_ptr(),
        norm_weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        address(branch_scale),
        _rows_per_image(len(branch), grad_out),
        grad.data_ptr(),
        *(total.data_ptr() for total in sums),
    )
    return [grad, *sums]


def _added(grad_out: Tensor, product: Tensor) -> Tensor:
    """The gradient that reaches x past the branch, and the one through it."""
    assert native.extension is not None
    out = native.empty(grad_out.shape, grad_out.dtype)
    nothing = torch.zeros(product.shape[-1])
    native.extension.residual_forward(
        rows_and_dtypes(product, grad_out.dtype),
        grad_out.data_ptr(),
        product.data_ptr(),
        nothing.data_ptr(),
        0,
        0,
        1,
        out.data_ptr(),
    )
    return out
