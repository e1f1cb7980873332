"""Calls the C++ kernels of substitute_mask_tokens with the addresses of contiguous tensors."""

import torch
from torch import Tensor

from simmim_kernels import native


def forward(tokens: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
    """[B, L, D]; all inputs contiguous and of one dtype."""
    assert native.extension is not None
    out = native.empty(tokens.shape, tokens.dtype)
    B, L, D = tokens.shape
    native.extension.substitute_mask_tokens_forward(
        tokens.data_ptr(),
        mask.data_ptr(),
        mask_token.data_ptr(),
        0 if pos_embed is None else pos_embed.data_ptr(),
        out.data_ptr(),
        B * L,
        L,
        D,
        native.DTYPE_CODES[tokens.dtype],
        torch.get_num_threads(),
    )
    return out


def backward(grad_out: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens [B, L, D] and of the mask token [D]."""
    assert native.extension is not None
    B, L, D = grad_out.shape
    grad_tokens = native.empty(grad_out.shape, grad_out.dtype)
    grad_mask_token = torch.empty(D, dtype=torch.float32)
    native.extension.substitute_mask_tokens_backward(
        grad_out.data_ptr(),
        mask.data_ptr(),
        grad_tokens.data_ptr(),
        grad_mask_token.data_ptr(),
        B * L,
        D,
        native.DTYPE_CODES[grad_out.dtype],
        torch.get_num_threads(),
    )
    return grad_tokens, grad_mask_token.to(grad_out.dtype)
