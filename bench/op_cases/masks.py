"""Masks: drawing them, and putting the mask token in the place of hidden tokens.

Source of the published form: microsoft/SimMIM data/data_simmim.py and models/simmim.py.
"""

import numpy as np
import torch
from torch import Tensor

from bench.op_cases.case import Case, dtype_name, three_sides
from bench.op_cases.shapes import BATCH, IMAGE, PATCH, UNIT, WIDTH, token_mask_of
from simmim_kernels import random_patch_mask, substitute_mask_tokens

MASK_BATCH = 256


def substitute(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    mask = token_mask_of(units).flatten(1)
    tokens = torch.randn(BATCH, mask.shape[1], WIDTH, device=units.device).to(dtype)
    token = torch.randn(WIDTH, device=units.device).to(dtype)
    grad = torch.randn_like(tokens)
    tokens.requires_grad_(), token.requires_grad_()

    def published(tokens: Tensor, token: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).type_as(token)
        return tokens * (1.0 - weight) + token.expand_as(tokens) * weight

    def ours(tokens: Tensor, token: Tensor) -> Tensor:
        return substitute_mask_tokens(tokens, mask, token, backend=backend)

    visible = int((~mask).sum()) * WIDTH * tokens.element_size()
    return Case(
        f"substitute_mask_tokens {dtype_name(dtype)}",
        three_sides(ours, published, [tokens, token], grad),
        2e-2 if dtype == torch.bfloat16 else 1e-4,
        visible + 3 * tokens.nbytes + 2 * mask.nbytes,
        {"eager": 4.0, "compile": 2.0, "copy": 0.8} if dtype == torch.bfloat16 else {},
    )


def random_mask(units: Tensor, backend: str) -> Case:
    device = units.device
    tokens, scale = IMAGE // PATCH, UNIT // PATCH
    side = IMAGE // UNIT
    num_hidden = int(np.ceil(side**2 * 0.6))

    def one_image() -> np.ndarray:
        mask = np.zeros(side**2, dtype=int)
        mask[np.random.permutation(side**2)[:num_hidden]] = 1
        return mask.reshape(side, side).repeat(scale, axis=0).repeat(scale, axis=1)

    def published() -> list[Tensor]:
        masks = torch.stack([torch.as_tensor(one_image()) for _ in range(MASK_BATCH)])
        return [masks.to(device)]

    def ours() -> list[Tensor]:
        mask = random_patch_mask(
            MASK_BATCH, (tokens, tokens), unit=scale, seed=1, device=device, backend=backend
        )
        return [mask]

    return Case(
        "random_patch_mask",
        {"ours": ours, "eager": published},
        0.0,
        None,
        {"eager": 20.0},
        compared=lambda mask: mask.sum((1, 2)),  # other draws, equally many hidden
    )
