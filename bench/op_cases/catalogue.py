"""All cases by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.op_cases.blocks import attention_in_windows, mlp_branch, norm_relu
from bench.op_cases.case import Case
from bench.op_cases.crops import crop
from bench.op_cases.losses import linear_loss, loss_from_tokens
from bench.op_cases.masks import random_mask, substitute
from bench.op_cases.shapes import BATCH, IMAGE, UNIT
from simmim_kernels import random_patch_mask

# (mask, bool [B, h, w] of mask units on the device to run on; backend) → case
Builder = Callable[[Tensor, str], Case]

CASES: dict[str, Builder] = {
    "substitute_mask_tokens bfloat16": partial(substitute, torch.bfloat16),
    "substitute_mask_tokens float32": partial(substitute, torch.float32),
    "masked_l1_loss_from_tokens float32": partial(loss_from_tokens, torch.float32),
    "masked_l1_loss_from_tokens bfloat16": partial(loss_from_tokens, torch.bfloat16),
    "linear_masked_l1_loss bfloat16": partial(linear_loss, torch.bfloat16),
    "linear_masked_l1_loss float32": partial(linear_loss, torch.float32),
    "random_patch_mask": random_mask,
    "window_attention bfloat16": partial(attention_in_windows, torch.bfloat16),
    "window_attention float32": partial(attention_in_windows, torch.float32),
    "residual_mlp bfloat16": partial(mlp_branch, torch.bfloat16),
    "residual_mlp float32": partial(mlp_branch, torch.float32),
}

# Ops without Triton kernels. `crop_resize` works on NumPy arrays in data workers.
CPU_CASES: dict[str, Builder] = {
    "batch_norm_relu bfloat16": partial(norm_relu, torch.bfloat16),
    "batch_norm_relu float32": partial(norm_relu, torch.float32),
    "crop_resize": crop,
}


def make_case(name: str, device: torch.device, backend: str) -> Case:
    """Build the case with that name; "ours" runs through `backend` and nothing else."""
    torch.manual_seed(0)
    units = random_patch_mask(BATCH, (IMAGE // UNIT,) * 2, seed=0, device=device)
    return (CASES | CPU_CASES)[name](units, backend)
