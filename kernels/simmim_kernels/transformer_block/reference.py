"""The two residual branches of a pre-norm transformer block in plain PyTorch.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, S tokens of a
window. Under autocast each operation casts as autocast casts it.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.window_attention import reference


def residual_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    eps: float,
    attend: Callable[..., Tensor] = reference.window_attention,
) -> Tensor:
    """x [B, H, W, C], bias [N, S, S] or None, gamma [C], branch_scale [B] → [B, H, W, C]."""
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    qkv = F.linear(y, qkv_weight, qkv_bias)
    attended = attend(qkv, bias, num_heads, window, shift, scale)
    return _add(x, F.linear(attended, proj_weight, proj_bias), gamma, branch_scale)


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    gamma: Tensor | None,
    branch_scale: Tensor | None,
    eps: float,
) -> Tensor:
    """x [B, …, C], fc1_weight [M, C], fc2_weight [C, M], gamma [C], branch_scale [B]; like x."""
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    branch = F.linear(F.gelu(F.linear(y, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return _add(x, branch, gamma, branch_scale)


def _add(x: Tensor, branch: Tensor, gamma: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    if gamma is not None:
        branch = gamma * branch
    if branch_scale is not None:
        branch = branch * branch_scale.view(-1, *(1,) * (x.dim() - 1)).to(branch.dtype)
    return (x + branch).to(x.dtype)  # under autocast a float32 gamma widens the branch
