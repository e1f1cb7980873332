"""Drop-in ops for masked image modelling; they need torch only and know nothing of the engine."""

from simmim_kernels.linear_masked_l1_loss import linear_masked_l1_loss
from simmim_kernels.masked_l1_loss import masked_l1_loss, masked_l1_loss_from_tokens
from simmim_kernels.random_patch_mask import random_patch_mask
from simmim_kernels.substitute_mask_tokens import substitute_mask_tokens

__all__ = [
    "linear_masked_l1_loss",
    "masked_l1_loss",
    "masked_l1_loss_from_tokens",
    "random_patch_mask",
    "substitute_mask_tokens",
]
