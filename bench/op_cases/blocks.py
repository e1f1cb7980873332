"""Parts of encoder blocks: window attention, the MLP of a residual branch, batch norm with ReLU.

The published form of the first two is the op in plain PyTorch, which follows the published model.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.op_cases.case import Case, dtype_name, three_sides
from bench.op_cases.shapes import STAGE_BATCH, STAGE_HEADS, STAGE_SIDE, STAGE_WIDTH, WINDOW
from simmim_kernels import batch_norm_relu, residual_mlp, window_attention


def attention_in_windows(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    device, shape = units.device, (STAGE_BATCH, STAGE_SIDE, STAGE_SIDE)
    qkv = torch.randn(*shape, 3 * STAGE_WIDTH, device=device).to(dtype).requires_grad_()
    table = torch.randn((2 * WINDOW - 1) ** 2, STAGE_HEADS, device=device).requires_grad_()
    grad = torch.randn(*shape, STAGE_WIDTH, device=device).to(dtype)

    def attend(qkv: Tensor, table: Tensor, name: str) -> Tensor:
        return window_attention(qkv, table, STAGE_HEADS, WINDOW, WINDOW // 2, backend=name)

    plain = partial(attend, name="reference")
    return Case(
        f"window_attention {dtype_name(dtype)}",
        three_sides(partial(attend, name=backend), plain, [qkv, table], grad),
        5e-2 if dtype == torch.bfloat16 else 1e-4,
        # forward reads q, k, v and writes out; backward reads q, k, v and the gradient of out, and
        # writes the gradients of q, k, v
        (4 + 7) * grad.nbytes,
        {},
    )


def mlp_branch(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    device, C = units.device, STAGE_WIDTH
    shape = (STAGE_BATCH, STAGE_SIDE, STAGE_SIDE, C)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    norm = nn.LayerNorm(C, device=device)
    fc1 = nn.Linear(C, 4 * C, device=device)
    fc2 = nn.Linear(4 * C, C, device=device)
    grad = torch.randn(shape, device=device).to(dtype)
    leaves = [x, *(p for m in (norm, fc1, fc2) for p in m.parameters())]

    def branch(*leaves: Tensor, name: str) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return residual_mlp(*leaves, backend=name)

    plain = partial(branch, name="reference")
    return Case(
        f"residual_mlp {dtype_name(dtype)}",
        three_sides(partial(branch, name=backend), plain, leaves, grad),
        5e-2 if dtype == torch.bfloat16 else 1e-4,
        None,
        {},
    )


def norm_relu(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    """The end of a block in the first stage of ResNet-50, at 224 px; maps are channels-last."""
    shape = (STAGE_BATCH, 256, 56, 56)
    x, shortcut, grad = (
        torch.randn(shape, device=units.device).to(dtype, memory_format=torch.channels_last)
        for _ in range(3)
    )
    norm = nn.BatchNorm2d(shape[1], device=units.device)
    leaves = [x, shortcut, norm.weight, norm.bias]

    def ours(x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_relu(x, weight, bias, shortcut, backend=backend)[0]

    def published(x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, True) + shortcut, inplace=True)

    return Case(
        f"batch_norm_relu {dtype_name(dtype)}",
        three_sides(ours, published, leaves, grad),
        # in bf16, rounding decides the sign of a sum near 0, and so whether it has a gradient
        5e-2 if dtype == torch.bfloat16 else 1e-4,
        # forward: x, shortcut, out; backward: x, out, its gradient, the gradients of x and shortcut
        8 * x.nbytes,
        {},
    )
