"""Shapes of the cases: those of Swin-B at 192 px."""

from torch import Tensor

BATCH, IMAGE, PATCH, UNIT, STRIDE, WIDTH, HEAD_WIDTH = 64, 192, 4, 32, 32, 128, 1024
# the third stage, where most of the blocks are
STAGE_BATCH, STAGE_SIDE, STAGE_WIDTH, STAGE_HEADS, WINDOW = 8, 12, 512, 16, 6


def token_mask_of(units: Tensor) -> Tensor:
    """The mask on the grid of tokens, bool [B, h, w], from that of mask units."""
    return units.repeat_interleave(UNIT // PATCH, 1).repeat_interleave(UNIT // PATCH, 2)
