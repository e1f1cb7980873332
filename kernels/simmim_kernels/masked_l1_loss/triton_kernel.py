"""The masked L1 loss in Triton: one pass over the hidden pixels, a small sum, one pass backward.

B batch, C channels, H W pixels, S side of a predicted cell (0: the prediction is an image). A run
is a row of pixels that lies contiguous in the prediction; a group is up to 16 pixels of a run, and
one sign word; R groups make a tile.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.masked_l1_loss import reference
from simmim_kernels.masked_l1_loss.arguments import Loss, Target, signs_shape
from simmim_kernels.triton_launch import cdiv, kernel

# Groups of a tile: 2048 pixels, 16 bytes of a uint8 image for each of 128 threads.
GROUPS_PER_PROGRAM = 128


@triton.jit
def sign_words(error, o_lane, AXIS: tl.constexpr):
    """Bit e where the error of lane e is above 0, bit 16 + e where it is below."""
    high = tl.sum(tl.where(error > 0, 1 << o_lane, 0), axis=AXIS)
    low = tl.sum(tl.where(error < 0, 1 << o_lane, 0), axis=AXIS)
    return high | (low << 16)


@triton.jit
def signs_of(word, o_lane):
    """The inverse of `sign_words`, in float32: 1, -1 or 0."""
    return (((word >> o_lane) & 1) - ((word >> (o_lane + 16)) & 1)).to(tl.float32)


@kernel
@triton.jit
def _masked_l1(
    p_prediction,
    p_image,
    p_mask,
    p_mean,
    p_std,
    p_signs,
    p_partial,
    groups,
    prediction_b,
    prediction_c,
    prediction_y,
    prediction_x,
    image_b,
    image_c,
    image_y,
    image_x,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    BYTES: tl.constexpr,
    KEEP_SIGNS: tl.constexpr,
    R: tl.constexpr,
):
    RUN: tl.constexpr = S if S > 0 else W
    GROUPS: tl.constexpr = (RUN + 15) // 16
    o_group = tl.program_id(0) * R + tl.arange(0, R)
    o_lane = tl.arange(0, 16)
    m_group = o_group < groups
    run, q = o_group // GROUPS, o_group % GROUPS
    if S > 0:  # runs in the order [B, h, w, C, S]
        i = run % S
        c = run // S % C
        cell = run // (S * C)
        x = cell % (W // S) * S + q * 16
        y = cell // (W // S) % (H // S) * S + i
        b = cell // (W // S) // (H // S)
    else:  # runs in the order [B, C, H]
        x = q * 16
        y = run % H
        c = run // H % C
        b = run // H // C
    b = b.to(tl.int64)  # offsets may pass 2^31 elements
    o_cell = (b * (H // CELL_H) + y // CELL_H) * (W // CELL_W)
    if CELL_W % 16 == 0 and RUN % 16 == 0:  # a group lies within one cell of the mask
        hidden = tl.load(p_mask + o_cell + x // CELL_W, mask=m_group, other=0) != 0
        m_tile = tl.broadcast_to((m_group & hidden)[:, None], (R, 16))
    else:
        m_tile = m_group[:, None] & (q[:, None] * 16 + o_lane[None, :] < RUN)
        o_mask = o_cell[:, None] + (x[:, None] + o_lane[None, :]) // CELL_W
        m_tile = m_tile & (tl.load(p_mask + o_mask, mask=m_tile, other=0) != 0)

    if S == 0:
        o_row = b * prediction_b + c * prediction_c + y * prediction_y + x * prediction_x
        o_prediction = o_row[:, None] + o_lane[None, :] * prediction_x
    elif S % 16 == 0:
        o_prediction = o_group.to(tl.int64)[:, None] * 16 + o_lane[None, :]
    else:
        o_prediction = (run.to(tl.int64) * S + q * 16)[:, None] + o_lane[None, :]
    o_row = b * image_b + c * image_c + y * image_y + x * image_x
    o_image = o_row[:, None] + o_lane[None, :] * image_x
    prediction = tl.load(p_prediction + o_prediction, mask=m_tile, other=0.0).to(tl.float32)
    target = tl.load(p_image + o_image, mask=m_tile, other=0).to(tl.float32)
    if BYTES:
        mean = tl.load(p_mean + c, mask=m_group, other=0.0)
        std = tl.load(p_std + c, mask=m_group, other=1.0)
        target = target * (1.0 / (255.0 * std))[:, None] - (mean / std)[:, None]
    error = tl.where(m_tile, prediction - target, 0.0)
    if KEEP_SIGNS:
        tl.store(p_signs + o_group, sign_words(error, o_lane[None, :], 1), mask=m_group)
    tl.store(p_partial + tl.program_id(0), tl.sum(tl.sum(tl.abs(error), axis=1), axis=0))


@kernel
@triton.jit
def _finish(
    p_partial, p_mask, p_loss, p_per_pixel, partials, cells, pixels_per_cell, C, N: tl.constexpr
):
    o = tl.arange(0, N)
    b_sum = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, partials, N):
        b_sum += tl.load(p_partial + start + o, mask=start + o < partials, other=0.0)
    b_count = tl.zeros((N,), dtype=tl.int32)
    for start in range(0, cells, N):
        b_count += tl.load(p_mask + start + o, mask=start + o < cells, other=0).to(tl.int32)
    pixels = (tl.sum(b_count, axis=0).to(tl.int64) * pixels_per_cell).to(tl.float32)
    per_pixel = 1.0 / (pixels + 1e-5) / C
    tl.store(p_loss, tl.sum(b_sum, axis=0) * per_pixel)
    tl.store(p_per_pixel, per_pixel)


@kernel
@triton.jit
def _masked_l1_backward(p_step, p_signs, p_grad, groups, RUN: tl.constexpr, R: tl.constexpr):
    GROUPS: tl.constexpr = (RUN + 15) // 16
    o_group = tl.program_id(0) * R + tl.arange(0, R)
    o_lane = tl.arange(0, 16)
    m_group = o_group < groups
    word = tl.load(p_signs + o_group, mask=m_group, other=0)
    b_grad = signs_of(word[:, None], o_lane[None, :]) * tl.load(p_step)
    if RUN % 16 == 0:
        o_grad = o_group.to(tl.int64)[:, None] * 16 + o_lane[None, :]
        m_tile = tl.broadcast_to(m_group[:, None], (R, 16))
    else:
        within = (o_group % GROUPS * 16)[:, None] + o_lane[None, :]
        o_grad = (o_group // GROUPS).to(tl.int64)[:, None] * RUN + within
        m_tile = m_group[:, None] & (within < RUN)
    tl.store(p_grad + o_grad, b_grad.to(p_grad.dtype.element_ty), mask=m_tile)


def finish(partial: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient per hidden pixel from the partial sums, without leaving the device."""
    loss = torch.empty((), dtype=torch.float32, device=image.device)
    per_pixel = torch.empty_like(loss)
    pixels_per_cell = (image.shape[2] // mask.shape[1]) * (image.shape[3] // mask.shape[2])
    _finish[(1,)](
        partial,
        mask.view(torch.int8),
        loss,
        per_pixel,
        partial.numel(),
        mask.numel(),
        pixels_per_cell,
        image.shape[1],
        N=1024,
        num_warps=8,
    )
    return loss, per_pixel


def plain_target(target: Target) -> tuple[Tensor, bool]:
    """The image as the kernels take it, and whether it is still bytes to be normalised.

    The sliding-window target comes from torch's pooling, which needs images of float32.
    """
    image, _, mean, std, _, norm_target = target
    if not norm_target:
        return image, image.dtype == torch.uint8
    if mean is not None and std is not None:
        image = reference.normalise_pixels(image, mean, std)
    return reference.normalise_target(image.float(), norm_target), False


def forward(prediction: Tensor, target: Target, keep_signs: bool) -> Loss:
    """The loss and what its gradient needs."""
    image, is_bytes = plain_target(target)
    _, mask, mean, std, stride, _ = target
    _, C, H, W = image.shape
    if stride:
        prediction = prediction.contiguous()
    shape = signs_shape(prediction.shape, target)
    groups = shape[0]
    for size in shape[1:]:
        groups *= size
    signs = prediction.new_empty(shape if keep_signs else [0], dtype=torch.int32)
    programs = cdiv(groups, GROUPS_PER_PROGRAM)
    partial = prediction.new_empty(programs, dtype=torch.float32)
    if programs:
        _masked_l1[(programs,)](
            prediction,
            image,
            mask.view(torch.int8),
            partial if mean is None else mean,
            partial if std is None else std,
            signs,
            partial,
            groups,
            *(prediction.stride() if stride == 0 else (0, 0, 0, 1)),
            *image.stride(),
            C=C,
            H=H,
            W=W,
            S=stride,
            CELL_H=H // mask.shape[1],
            CELL_W=W // mask.shape[2],
            BYTES=is_bytes,
            KEEP_SIGNS=keep_signs,
            R=GROUPS_PER_PROGRAM,
            num_warps=4,
        )
    return Loss(*finish(partial, image, mask), signs)


def backward(
    grad_out: Tensor, per_pixel: Tensor, signs: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Signs times both scalars, which stay on the device, in the layout of the prediction."""
    grad = signs.new_empty(tuple(shape), dtype=dtype)
    groups = signs.numel()
    if groups:
        _masked_l1_backward[(cdiv(groups, GROUPS_PER_PROGRAM),)](
            grad_out * per_pixel,
            signs,
            grad,
            groups,
            RUN=grad.numel() // (groups // signs.shape[-1]),
            R=GROUPS_PER_PROGRAM,
            num_warps=4,
        )
    return grad
