"""Calls the C++ kernels of embed_patches around PyTorch's matrix product.

V visible patches, D width, E = C·p·p pixels of a patch.
"""

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.embed_patches.arguments import (
    Embedded,
    EmbeddingParameters,
    Patches,
    num_tokens,
)
from simmim_kernels.native import DTYPE_CODES, address, multiply


def forward(
    patches: Patches,
    parameters: EmbeddingParameters,
    pos_embed: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    visible: int,
) -> Embedded:
    """The tokens and what is kept."""
    assert native.extension is not None
    weight, bias, norm_weight, norm_bias, mask_token = parameters
    L, D = num_tokens(patches.image, weight), len(weight)
    rows, place = _rows_of_visible(patches, weight)
    product = multiply(rows, weight.reshape(D, -1).t())
    room = 0 if norm_weight is None else visible
    projected = native.empty((room, D), dtype)
    norm_mean, norm_rstd = torch.zeros(room), torch.ones(room)
    out = native.empty((len(patches.image), L, D), dtype)
    mask_token = None if mask_token is None else mask_token.to(dtype)
    native.extension.place_tokens_forward(
        (len(place), D, DTYPE_CODES[dtype], DTYPE_CODES[weight.dtype], torch.get_num_threads()),
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
    return Embedded(out, projected, norm_mean, norm_rstd)


def backward(
    grad_out: Tensor,
    patches: Patches,
    parameters: EmbeddingParameters,
    projected: Tensor,
    norm_mean: Tensor,
    norm_rstd: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of the parameters."""
    assert native.extension is not None
    weight, bias, norm_weight, _, _ = parameters
    L, D = num_tokens(patches.image, weight), len(weight)
    rows, place = _rows_of_visible(patches, weight)
    grad_product = native.empty((len(rows), D), weight.dtype)
    vectors = [torch.zeros(D) for _ in range(4)]
    dtypes = DTYPE_CODES[grad_out.dtype], DTYPE_CODES[weight.dtype]
    native.extension.place_tokens_backward(
        (len(place), D, *dtypes, torch.get_num_threads()),
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


def _rows_of_visible(patches: Patches, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of the visible patches [V, E], and every token's row among them, -1 where hidden."""
    assert native.extension is not None
    image, mask, mean, std = patches
    if mask is None:
        visible = place = torch.arange(len(image) * num_tokens(image, weight))
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
