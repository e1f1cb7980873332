"""The residual branches of a transformer block in PyTorch, normalised at their start or end.

B batch, H W token rows and columns, C width. Under autocast each operation casts as autocast casts
it. Parameters are those of arguments.py, in the dtype of x or, under autocast, in any.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.transformer_block.arguments import AttentionParameters, MlpParameters
from simmim_kernels.window_attention import reference
from simmim_kernels.window_attention.arguments import Windows

Attend = Callable[..., Tensor]


def residual_attention(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
    attend: Attend = reference.window_attention,
) -> Tensor:
    """x [B, H, W, C], branch_scale [B] or None → [B, H, W, C]."""
    y = _layer_norm(x, parameters, eps)
    return _add(x, _attention(y, parameters, windows, attend), parameters.gamma, branch_scale)


def post_norm_attention(
    x: Tensor,
    parameters: AttentionParameters,
    branch_scale: Tensor | None,
    windows: Windows,
    eps: float,
    attend: Attend = reference.window_attention,
) -> Tensor:
    """x [B, H, W, C], branch_scale [B] or None → [B, H, W, C]."""
    branch = _layer_norm(_attention(x, parameters, windows, attend), parameters, eps)
    return _add(x, branch, parameters.gamma, branch_scale)


def residual_mlp(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> Tensor:
    """x [B, …, C], branch_scale [B] or None; like x."""
    branch = _mlp(_layer_norm(x, parameters, eps), parameters)
    return _add(x, branch, parameters.gamma, branch_scale)


def post_norm_mlp(
    x: Tensor, parameters: MlpParameters, branch_scale: Tensor | None, eps: float
) -> Tensor:
    """x [B, …, C], branch_scale [B] or None; like x."""
    branch = _layer_norm(_mlp(x, parameters), parameters, eps)
    return _add(x, branch, parameters.gamma, branch_scale)


def _layer_norm(x: Tensor, parameters: AttentionParameters | MlpParameters, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], parameters.norm_weight, parameters.norm_bias, eps)


def _attention(
    x: Tensor, parameters: AttentionParameters, windows: Windows, attend: Attend
) -> Tensor:
    qkv = F.linear(x, parameters.qkv_weight, parameters.qkv_bias)
    if parameters.factors is None:
        attended = attend(qkv, parameters.bias, *windows)
    else:
        attended = attend(qkv, parameters.bias, *windows, parameters.factors)
    return F.linear(attended, parameters.proj_weight, parameters.proj_bias)


def _mlp(x: Tensor, parameters: MlpParameters) -> Tensor:
    hidden = F.gelu(F.linear(x, parameters.fc1_weight, parameters.fc1_bias))
    return F.linear(hidden, parameters.fc2_weight, parameters.fc2_bias)


def _add(x: Tensor, branch: Tensor, gamma: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    if gamma is not None:
        branch = gamma * branch
    if branch_scale is not None:
        branch = branch * branch_scale.view(-1, *(1,) * (x.dim() - 1)).to(branch.dtype)
    # under autocast a float32 gamma widens the branch, and a GPU normalises in float32
    return (x + branch).to(x.dtype)
