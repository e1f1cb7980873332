"""Mask-token substitution in plain PyTorch."""

import torch
from torch import Tensor


def substitute_mask_tokens(
    tokens: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None
) -> Tensor:
    """tokens [B, L, D], mask bool [B, L], mask_token [D], pos_embed [L, D] or None → [B, L, D]."""
    # `where` and not x·(1-w) + token·w: a NaN under a hidden token must not get through
    out = torch.where(mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
    return out if pos_embed is None else out + pos_embed.to(tokens.dtype)
