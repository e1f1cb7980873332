"""Drop-in ops for masked image modelling; they need torch only and know nothing of the engine."""

from simmim_kernels.batch_norm_relu import batch_norm_relu
from simmim_kernels.crop_resize import crop_resize
from simmim_kernels.embed_patches import embed_patches
from simmim_kernels.gradient_norm import gradient_norm
from simmim_kernels.linear_masked_l1_loss import linear_masked_l1_loss
from simmim_kernels.masked_l1_loss import masked_l1_loss, masked_l1_loss_from_tokens
from simmim_kernels.merge_patches import merge_patches
from simmim_kernels.random_branch_scales import random_branch_scales
from simmim_kernels.random_patch_mask import random_patch_mask
from simmim_kernels.substitute_mask_tokens import substitute_mask_tokens
from simmim_kernels.transformer_block import (
    post_norm_attention,
    post_norm_mlp,
    residual_attention,
    residual_mlp,
)
from simmim_kernels.window_attention import window_attention

__all__ = [
    "batch_norm_relu",
    "crop_resize",
    "embed_patches",
    "gradient_norm",
    "linear_masked_l1_loss",
    "masked_l1_loss",
    "masked_l1_loss_from_tokens",
    "merge_patches",
    "post_norm_attention",
    "post_norm_mlp",
    "random_branch_scales",
    "random_patch_mask",
    "residual_attention",
    "residual_mlp",
    "substitute_mask_tokens",
    "window_attention",
]
