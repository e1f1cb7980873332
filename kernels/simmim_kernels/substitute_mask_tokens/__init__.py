"""Puts the learned mask token in place of hidden tokens."""

from typing import Any

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.dispatch import Backend, choose, never
from simmim_kernels.substitute_mask_tokens import reference

__all__ = ["BACKENDS", "substitute_mask_tokens"]

BACKENDS = (Backend("native", native.reasons_against), Backend("reference", never))


def substitute_mask_tokens(
    tokens: Tensor,
    mask: Tensor,
    mask_token: Tensor,
    *,
    pos_embed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows of `tokens` where `mask` is True become the mask token; then positions are added.

    Args:
        tokens: [B, L, D]; float32, bfloat16 or float16 (other floating types on the reference).
        mask: bool [B, L]; True marks a hidden token.
        mask_token: [D]; taken in the dtype of `tokens`.
        pos_embed: [L, D] or None; added to every image, taken in the dtype of `tokens`.
        backend: "native" (CPU) or "reference"; None takes the first that can run.

    Returns:
        [B, L, D], the dtype and device of `tokens`. Gradients flow to tokens (0 at hidden rows,
        whatever they hold), mask_token (summed in float32) and pos_embed.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/simmim.py SwinTransformerForSimMIM.forward.
    """
    shapes = (
        f"tokens {tuple(tokens.shape)} {tokens.dtype} {tokens.device}, "
        f"mask {tuple(mask.shape)} {mask.dtype} {mask.device}, "
        f"mask_token {tuple(mask_token.shape)} {mask_token.dtype} {mask_token.device}"
    )
    if pos_embed is not None:
        shapes += f", pos_embed {tuple(pos_embed.shape)} {pos_embed.dtype} {pos_embed.device}"
    if tokens.dim() != 3 or mask.shape != tokens.shape[:2] or mask_token.shape != tokens.shape[2:]:
        raise ValueError(f"expected tokens [B, L, D], mask [B, L], mask_token [D]: {shapes}")
    if mask.dtype != torch.bool or not tokens.dtype.is_floating_point:
        raise ValueError(f"expected a bool mask and floating point tokens: {shapes}")
    if pos_embed is not None and pos_embed.shape != tokens.shape[1:]:
        raise ValueError(f"expected pos_embed [L, D]: {shapes}")
    devices = {t.device for t in (tokens, mask, mask_token, pos_embed) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device: {shapes}")
    mask_token = mask_token.to(tokens.dtype)
    if pos_embed is not None:
        pos_embed = pos_embed.to(tokens.dtype)
    chosen = choose(
        "substitute_mask_tokens", BACKENDS, (tokens, mask, mask_token, pos_embed), backend
    )
    if chosen == "reference":
        return reference.substitute_mask_tokens(tokens, mask, mask_token, pos_embed)
    out: Tensor = torch.ops.simmim.substitute_mask_tokens(tokens, mask, mask_token, pos_embed)
    return out


torch.library.define(
    "simmim::substitute_mask_tokens",
    "(Tensor tokens, Tensor mask, Tensor mask_token, Tensor? pos_embed) -> Tensor",
)
torch.library.define(
    "simmim::substitute_mask_tokens_backward",
    "(Tensor grad_out, Tensor mask) -> (Tensor, Tensor)",
)


@torch.library.impl("simmim::substitute_mask_tokens", "cpu")
def _forward_native(
    tokens: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None
) -> Tensor:
    assert native.extension is not None
    tokens, mask, mask_token = tokens.contiguous(), mask.contiguous(), mask_token.contiguous()
    position = None if pos_embed is None else pos_embed.contiguous()
    out = torch.empty_like(tokens)
    B, L, D = tokens.shape
    native.extension.substitute_mask_tokens_forward(
        tokens.data_ptr(),
        mask.data_ptr(),
        mask_token.data_ptr(),
        0 if position is None else position.data_ptr(),
        out.data_ptr(),
        B * L,
        L,
        D,
        native.DTYPE_CODES[tokens.dtype],
        torch.get_num_threads(),
    )
    return out


@torch.library.impl("simmim::substitute_mask_tokens_backward", "cpu")
def _backward_native(grad_out: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    assert native.extension is not None
    grad_out, mask = grad_out.contiguous(), mask.contiguous()
    B, L, D = grad_out.shape
    grad_tokens = torch.empty_like(grad_out)
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


def _forward_fake(
    tokens: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None
) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _backward_fake(grad_out: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    grad_tokens = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    return grad_tokens, grad_out.new_empty(grad_out.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, _, pos_embed = inputs
    ctx.save_for_backward(mask)
    ctx.has_position = pos_embed is not None


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
    (mask,) = ctx.saved_tensors
    grad_tokens, grad_mask_token = torch.ops.simmim.substitute_mask_tokens_backward(grad_out, mask)
    grad_position = grad_out.sum(0) if ctx.has_position else None
    return grad_tokens, None, grad_mask_token, grad_position


torch.library.register_fake("simmim::substitute_mask_tokens", _forward_fake)
torch.library.register_fake("simmim::substitute_mask_tokens_backward", _backward_fake)
torch.library.register_autograd(
    "simmim::substitute_mask_tokens", _backward, setup_context=_setup_context
)
