"""Stochastic depth in Triton: a program draws one branch of some images."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.random_patch_mask.triton_kernel import _GAMMA, _fold, _mix, halves
from simmim_kernels.triton_launch import cdiv, kernel


@kernel
@triton.jit(do_not_specialize=["key_high", "key_low", "threshold_high", "threshold_low"])
def _random_branch_scales(
    p_ids,
    p_epochs,
    p_scales,
    key_high,
    key_low,
    threshold_high,
    threshold_low,
    batch,
    kept,
    K: tl.constexpr,
):
    o_image = tl.program_id(0) * K + tl.arange(0, K)
    m_image = o_image < batch
    # two halves, since Triton chooses the type of an integer argument by its value
    key = (key_high.to(tl.int64) << 32) | (key_low.to(tl.int64) & 0xFFFFFFFF)
    threshold = (threshold_high.to(tl.int64) << 32) | (threshold_low.to(tl.int64) & 0xFFFFFFFF)
    epoch = tl.load(p_epochs + o_image, mask=m_image, other=0)
    stream = _fold(_fold(key, epoch), tl.load(p_ids + o_image, mask=m_image, other=0))
    draw = _mix(stream + (tl.program_id(1) + 1).to(tl.int64) * _GAMMA)
    bits = (draw >> 11) & ((1 << 53) - 1)
    scale = tl.where(bits >= threshold, kept, 0.0)
    tl.store(p_scales + tl.program_id(1) * batch + o_image, scale, mask=m_image)


def forward(
    ids: Tensor, epochs: Tensor, key: int, threshold: int, kept: float, branches: int
) -> Tensor:
    """float32 [branches, B]; ids and epochs int64 [B]."""
    batch = ids.shape[0]
    scales = torch.empty(branches, batch, dtype=torch.float32, device=ids.device)
    if batch:
        _random_branch_scales[(cdiv(batch, 128), branches)](
            ids, epochs, scales, *halves(key), *halves(threshold), batch, kept, K=128, num_warps=4
        )
    return scales
