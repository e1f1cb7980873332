"""What a transformer block does between its matrix products, on the CPU: one pass of C++ each.

T tokens, C width, M hidden width of the MLP.
"""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.native import address, converted, multiply, rows_and_dtypes
from simmim_kernels.transformer_block.arguments import (
    AttentionParameters,
    MlpParameters,
    NormalisedBranch,
    Statistics,
)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, C] in `dtype`."""
    return converted(x, dtype).view(x.numel() // x.shape[-1], x.shape[-1])


def _rows_per_image(rows: int, images: Tensor) -> int:
    return max(1, rows // max(1, len(images)))


def gelu(product: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product in `dtype`, which is kept, and GELU of product and bias in its own dtype."""
    assert native.extension is not None
    hidden = product if product.dtype == dtype else native.empty(product.shape, dtype)
    activated = native.empty(product.shape, product.dtype)
    native.extension.gelu_forward(
        rows_and_dtypes(product, dtype),
        product.data_ptr(),
        bias.data_ptr(),
        0 if hidden is product else hidden.data_ptr(),
        activated.data_ptr(),
    )
    return hidden, activated


def gelu_gradient(
    grad: Tensor, hidden: Tensor, bias: Tensor, dtype: torch.dtype, of_parameters: bool
) -> tuple[Tensor, Tensor]:
    """GELU's output, computed again, and the gradient of the bias; that of `hidden` is in grad."""
    assert native.extension is not None
    activated = native.empty(grad.shape, grad.dtype)
    grad_bias = torch.zeros(len(bias) if of_parameters else 0)
    native.extension.gelu_backward(
        rows_and_dtypes(grad, dtype),
        hidden.data_ptr(),
        bias.data_ptr(),
        grad.data_ptr(),
        activated.data_ptr(),
        grad_bias.data_ptr(),
    )
    return activated, grad_bias


def layer_norm(
    x: Tensor, parameters: AttentionParameters | MlpParameters, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Statistics]:
    """y [T, C] in `dtype`, mean and rstd."""
    assert native.extension is not None
    C = x.shape[-1]
    y = native.empty((x.numel() // C, C), dtype)
    mean, rstd = torch.empty(len(y)), torch.empty(len(y))
    native.extension.layer_norm_forward(
        rows_and_dtypes(y, x.dtype),
        x.data_ptr(),
        parameters.norm_weight.data_ptr(),
        parameters.norm_bias.data_ptr(),
        eps,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    return y, Statistics(mean, rstd)


def layer_norm_gradient(
    x: Tensor,
    grad_out: Tensor,
    parameters: AttentionParameters | MlpParameters,
    norm: Statistics,
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
        parameters.norm_weight.data_ptr(),
        parameters.norm_bias.data_ptr(),
        norm.mean.data_ptr(),
        norm.rstd.data_ptr(),
        grad_y.data_ptr(),
        grad_x.data_ptr(),
        of_norm[0].data_ptr(),
        of_norm[1].data_ptr(),
    )
    return grad_x, grad_y, of_norm


def add_branch(
    x: Tensor,
    product: Tensor,
    bias: Tensor,
    gamma: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """x + branch_scale · gamma · (product + bias)."""
    assert native.extension is not None
    out = native.empty(x.shape, x.dtype)
    native.extension.residual_forward(
        rows_and_dtypes(product, x.dtype),
        x.data_ptr(),
        product.data_ptr(),
        bias.data_ptr(),
        address(gamma),
        address(branch_scale),
        _rows_per_image(len(product), x),
        out.data_ptr(),
    )
    return out


def add_gradients(grad_out: Tensor, product: Tensor) -> Tensor:
    """The gradient that reaches x past the branch, and the one through it."""
    return add_branch(grad_out, product, torch.zeros(product.shape[-1]))


def branch_gradient(
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
            _rows_per_image(len(flat), grad_out),
            0 if same else grad.data_ptr(),
            total.data_ptr(),
        )
    return grad, total


def scaled_rows(weight: Tensor, gamma: Tensor | None) -> Tensor:
    """LayerScale moved into the weight that comes before it: smaller than the activations."""
    return weight if gamma is None else (gamma.unsqueeze(1) * weight).to(weight.dtype)


def projection_gradient(
    grad_branch: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    column_sum: Tensor,
) -> list[Tensor | None]:
    """Gradients of weight, bias and gamma of gamma · (inputs · weightᵀ + bias).

    That of gamma is a sum over tokens of grad · (W·input + b), which needs no branch: it is the
    weight times the product that makes the weight's own gradient.
    """
    assert native.extension is not None
    inputs = rows(inputs, grad_branch.dtype)
    grad_weight = multiply(grad_branch.t(), inputs)
    if gamma is None:
        return [grad_weight, column_sum, None]
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


def add_normalised(
    x: Tensor,
    branch: Tensor,
    bias: Tensor,
    parameters: AttentionParameters | MlpParameters,
    branch_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, NormalisedBranch]:
    """x + branch_scale · norm(branch + bias), and the branch in the dtype of x, mean and rstd."""
    assert native.extension is not None
    out = native.empty(x.shape, x.dtype)
    kept = branch if branch.dtype == x.dtype else native.empty(branch.shape, x.dtype)
    mean, rstd = torch.empty(len(branch)), torch.empty(len(branch))
    native.extension.post_norm_forward(
        rows_and_dtypes(branch, x.dtype),
        x.data_ptr(),
        branch.data_ptr(),
        bias.data_ptr(),
        parameters.norm_weight.data_ptr(),
        parameters.norm_bias.data_ptr(),
        eps,
        address(branch_scale),
        _rows_per_image(len(branch), x),
        0 if kept is branch else kept.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        out.data_ptr(),
    )
    return out, NormalisedBranch(kept, mean, rstd)


def add_normalised_gradient(
    grad_out: Tensor,
    norm: NormalisedBranch,
    bias: Tensor,
    norm_weight: Tensor,
    branch_scale: Tensor | None,
    dtype: torch.dtype,
    of_parameters: bool,
) -> list[Tensor]:
    """Gradients of the branch, [T, C] in `dtype`, of its bias and of the norm's weight and bias."""
    assert native.extension is not None
    grad = native.empty(norm.branch.shape, dtype)
    sums = [torch.zeros(len(bias) if of_parameters else 0) for _ in range(3)]
    native.extension.post_norm_backward(
        rows_and_dtypes(grad, grad_out.dtype),
        grad_out.data_ptr(),
        norm.branch.data_ptr(),
        bias.data_ptr(),
        norm_weight.data_ptr(),
        norm.mean.data_ptr(),
        norm.rstd.data_ptr(),
        address(branch_scale),
        _rows_per_image(len(norm.branch), grad_out),
        grad.data_ptr(),
        *(total.data_ptr() for total in sums),
    )
    return [grad, *sums]
