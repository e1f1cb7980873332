"""Puts the learned mask token in place of hidden tokens."""

import torch
from torch import Tensor

from simmim_kernels.dispatch import BACKENDS, choose, describe
from simmim_kernels.op import Op
from simmim_kernels.substitute_mask_tokens import reference

__all__ = ["BACKENDS", "substitute_mask_tokens"]


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
        backend: "triton" (GPU), "native" (CPU) or "reference"; None takes the first that can run.

    Returns:
        [B, L, D], the dtype and device of `tokens`. Gradients flow to tokens (0 at hidden rows,
        whatever they hold), mask_token (summed in float32) and pos_embed.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/simmim.py SwinTransformerForSimMIM.forward.
    """

    def error(what: str) -> ValueError:
        given = describe(tokens=tokens, mask=mask, mask_token=mask_token, pos_embed=pos_embed)
        return ValueError(f"{what}: {given}")

    if tokens.dim() != 3 or mask.shape != tokens.shape[:2] or mask_token.shape != tokens.shape[2:]:
        raise error("expected tokens [B, L, D], mask [B, L], mask_token [D]")
    if mask.dtype != torch.bool or not tokens.dtype.is_floating_point:
        raise error("expected a bool mask and floating point tokens")
    if pos_embed is not None and pos_embed.shape != tokens.shape[1:]:
        raise error("expected pos_embed [L, D]")
    if any(t is not None and t.device != tokens.device for t in (mask, mask_token, pos_embed)):
        raise error("all tensors must be on one device")
    mask_token = mask_token.to(tokens.dtype)
    if pos_embed is not None:
        pos_embed = pos_embed.to(tokens.dtype)
    chosen = choose(
        "substitute_mask_tokens", BACKENDS, (tokens, mask, mask_token, pos_embed), backend
    )
    if chosen == "reference":
        return reference.substitute_mask_tokens(tokens, mask, mask_token, pos_embed)
    return _substitute(chosen, tokens, mask, mask_token, pos_embed)


def _shapes(tokens: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _gradient_shapes(grad_out: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    grad_tokens = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    return grad_tokens, grad_out.new_empty(grad_out.shape[-1])


_substitute = Op(
    "substitute_mask_tokens",
    _shapes,
    _gradient_shapes,
    gradients=("tokens", "mask_token"),
    torch_gradients={"pos_embed": lambda grad_out: grad_out.sum(0)},
)
