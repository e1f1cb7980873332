"""What attention in windows takes beside its tensors."""

from typing import NamedTuple


class Windows(NamedTuple):
    """Settings of `window_attention`, in the order of its arguments.

    Attributes:
        num_heads: that divide the width.
        window: rows and columns of a window.
        shift: rows and columns of the cyclic shift.
        scale: factor of q·k.
    """

    num_heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    scale: float
