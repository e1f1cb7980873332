"""Calls the C++ kernels of embed_patches around PyTorch's matrix product.

V visible patches, D width, E = C·p·p pixels of a patch.
"""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.native import DTYPE_CODES, address, multiply


def forward(
    image: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    visible: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [B, L, D]; projection without its bias [visible, D], mean and rstd [visible]."""
    assert native.extension is not None
    B, L, D = _sizes(image, weight)
    rows, place = _rows_of_visible(image, mask, weight, mean, std)
    product = multiply(rows, weight.reshape(D, -1).t())
    room = 0 if norm_weight is None else visible
    projected = native.empty((room, D), dtype)
    norm_mean, norm_rstd = torch.zeros(room), torch.ones(room)
    out = native.empty((B, L, D), dtype)
    mask_token = None if mask_token is None else mask_token.to(dtype)
    native.extension.place_tokens_forward(
        (B * L, D, DTYPE_CODES[dtype], DTYPE_CODES[weight.dtype], torch.get_num_threads()),
        L,
        place.data_ptr(),
        address(bias),
        address(norm_weight),
        address(norm_bias),
        eps,
        product.data_ptr(),
        address(mask_token),
        address(pos_embed),
        projected.data_ptr() if room else 0,
        norm_mean.data_ptr(),
        norm_rstd.data_ptr(),
        out.data_ptr(),
    )
    return out, projected, norm_mean, norm_rstd


def backward(
    grad_out: Tensor,
    image: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    projected: Tensor,
    norm_mean: Tensor,
    norm_rstd: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of weight, bias, norm_weight, norm_bias and mask_token."""
    assert native.extension is not None
    B, L, D = _sizes(image, weight)
    rows, place = _rows_of_visible(image, mask, weight, mean, std)
    grad_product = native.empty((len(rows), D), weight.dtype)
    vectors = [torch.zeros(D) for _ in range(4)]
    dtypes = DTYPE_CODES[grad_out.dtype], DTYPE_CODES[weight.dtype]
    native.extension.place_tokens_backward(
        (B * L, D, *dtypes, torch.get_num_threads()),
        L,
        place.data_ptr(),
        address(bias),
        address(norm_weight),
        0,
        eps,
        grad_out.data_ptr(),
        projected.data_ptr(),
        norm_mean.data_ptr(),
        norm_rstd.data_ptr(),
        grad_product.data_ptr(),
        *(vector.data_ptr() for vector in vectors),
    )
    grad_weight = multiply(grad_product.t(), rows)
    return grad_weight.view(weight.shape), *vectors


def _sizes(image: Tensor, weight: Tensor) -> tuple[int, int, int]:
    patch = weight.shape[2]
    return len(image), image.shape[2] // patch * (image.shape[3] // patch), len(weight)


def _rows_of_visible(
    image: Tensor, mask: Tensor | None, weight: Tensor, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pixels of the visible patches [V, E], and every token's row among them, -1 where hidden."""
    assert native.extension is not None
    B, L, _ = _sizes(image, weight)
    if mask is None:
        visible = place = torch.arange(B * L)
    else:
        shown = ~mask.flatten()
        visible = shown.nonzero().squeeze(1)
        place = torch.where(shown, shown.cumsum(0) - 1, -1)
    rows = native.empty((len(visible), weight[0].numel()), weight.dtype)
    native.extension.gather_patches(
        image.data_ptr(),
        DTYPE_CODES[image.dtype],
        tuple(image.shape),
        tuple(image.stride()),
        [] if mean is None else mean.tolist(),
        [] if std is None else std.tolist(),
        weight.shape[2],
        visible.data_ptr(),
        len(visible),
        rows.data_ptr(),
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    return rows, place
