"""The residual branches of a transformer block, each as one op that saves the minimum.

They are normalised at their start (`residual_…`, as of ViT and Swin) or at their end
(`post_norm_…`, as of SwinV2).
"""

from simmim_kernels.transformer_block.attention import post_norm_attention, residual_attention
from simmim_kernels.transformer_block.mlp import post_norm_mlp, residual_mlp

__all__ = ["post_norm_attention", "post_norm_mlp", "residual_attention", "residual_mlp"]
