"""Drop-in ops for masked image modelling; they need torch only and know nothing of the engine."""

from simmim_kernels.masked_l1_loss import masked_l1_loss
from simmim_kernels.random_patch_mask import random_patch_mask
from simmim_kernels.substitute_mask_tokens import substitute_mask_tokens

__all__ = ["masked_l1_loss", "random_patch_mask", "substitute_mask_tokens"]
