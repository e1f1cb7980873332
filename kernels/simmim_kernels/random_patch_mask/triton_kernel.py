"""Random mask in Triton: one program sorts the draws of one image and hides the smallest.

U units (padded to a power of two), N tokens of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_kernels.splitmix import GAMMA, signed
from simmim_kernels.triton_launch import kernel, next_power_of_2

# int64 with the bits of SplitMix64's constants, as in simmim_kernels/splitmix.py
_GAMMA = tl.constexpr(signed(GAMMA))
_MULTIPLIER_1 = tl.constexpr(signed(0xBF58476D1CE4E5B9))
_MULTIPLIER_2 = tl.constexpr(signed(0x94D049BB133111EB))
_LARGEST = tl.constexpr(2**63 - 1)


@triton.jit
def _shift_right(z, BITS: tl.constexpr):
    # int64 shifts copy the sign; masking it off makes the shift logical
    return (z >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(z):
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _shift_right(z, 31)


@triton.jit
def _fold(key, part):
    return _mix(_mix(part + _GAMMA) ^ (key + _GAMMA))


@kernel
@triton.jit(do_not_specialize=["key_high", "key_low", "num_hidden"])
def _random_patch_mask(
    p_ids,
    p_epochs,
    p_mask,
    key_high,
    key_low,
    num_hidden,
    EPOCH_PER_SAMPLE: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    U: tl.constexpr,
    N: tl.constexpr,
):
    i_image = tl.program_id(0)
    epoch = tl.load(p_epochs + (i_image if EPOCH_PER_SAMPLE else 0))
    # two halves, since Triton chooses the type of an integer argument by its value
    key = (key_high.to(tl.int64) << 32) | (key_low.to(tl.int64) & 0xFFFFFFFF)
    stream = _fold(_fold(key, epoch), tl.load(p_ids + i_image))

    o_unit = tl.arange(0, U)
    draws = _mix(stream + (o_unit + 1).to(tl.int64) * _GAMMA)
    draws = tl.where(o_unit < UNITS, draws, _LARGEST)
    # the draw at place num_hidden of the sorted ones; no two are equal, since mixing is a bijection
    threshold = tl.sum(tl.where(o_unit == num_hidden - 1, tl.sort(draws), 0), axis=0)

    o_base = i_image.to(tl.int64) * TOKENS
    for start in range(0, TOKENS, N):
        o_token = start + tl.arange(0, N)
        row = o_token // (COLUMNS * UNIT) // UNIT
        column = o_token % (COLUMNS * UNIT) // UNIT
        unit = row * COLUMNS + column
        # a token draws its unit's number again: cheaper than fetching it from another thread
        draw = _mix(stream + (unit + 1).to(tl.int64) * _GAMMA)
        hidden = (draw <= threshold) & (num_hidden > 0)
        tl.store(p_mask + o_base + o_token, hidden.to(tl.int8), mask=o_token < TOKENS)


def halves(value: int) -> tuple[int, int]:
    """An int64 as two numbers that each fit an int32."""
    return value >> 32, (value & 0xFFFFFFFF) - (1 << 32 if value & (1 << 31) else 0)


def forward(
    ids: Tensor, epochs: Tensor, key: int, rows: int, columns: int, unit: int, num_hidden: int
) -> Tensor:
    """bool [B, rows·unit, columns·unit]; ids int64 [B], epochs int64 [B] or []."""
    batch, units = ids.shape[0], rows * columns
    mask = torch.empty(batch, rows * unit, columns * unit, dtype=torch.bool, device=ids.device)
    tokens = units * unit * unit
    if mask.numel() == 0:
        return mask
    padded = max(16, next_power_of_2(units))
    _random_patch_mask[(batch,)](
        ids,
        epochs,
        mask.view(torch.int8),
        *halves(key),
        num_hidden,
        EPOCH_PER_SAMPLE=epochs.dim() == 1,
        UNITS=units,
        COLUMNS=columns,
        UNIT=unit,
        TOKENS=tokens,
        U=padded,
        N=min(1024, max(16, next_power_of_2(tokens))),
        num_warps=1 if padded <= 128 else 4,
    )
    return mask
