"""The two residual branches of a block that normalises after them, in plain PyTorch.

B batch, H W token rows and columns, C width, N heads, M hidden width of the MLP, S tokens of a
window. Under autocast each operation casts as autocast casts it.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.window_attention import reference


def post_norm_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    factors: Tensor,
    bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    eps: float,
    attend: Callable[..., Tensor] = reference.window_attention,
) -> Tensor:
    """x [B, H, W, C], factors [N], bias [N, S, S] or None, branch_scale [B] → [B, H, W, C]."""
    qkv = F.linear(x, qkv_weight, qkv_bias)
    attended = attend(qkv, bias, num_heads, window, shift, 1.0, factors)
    branch = F.linear(attended, proj_weight, proj_bias)
    return _add(x, branch, norm_weight, norm_bias, branch_scale, eps)


def post_norm_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
) -> Tensor:
    """x [B, …, C], fc1_weight [M, C], fc2_weight [C, M], branch_scale [B]; like x."""
    branch = F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return _add(x, branch, norm_weight, norm_bias, branch_scale, eps)


def _add(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
) -> Tensor:
    branch = F.layer_norm(branch, branch.shape[-1:], weight, bias, eps)
    if branch_scale is not None:
        branch = branch * branch_scale.view(-1, *(1,) * (x.dim() - 1)).to(branch.dtype)
    return (x + branch).to(x.dtype)  # under autocast a GPU normalises in float32
