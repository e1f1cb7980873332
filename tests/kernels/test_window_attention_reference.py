"""Position bias and shift mask of windows, as published."""

import pytest
import torch
from torch import Tensor

from simmim_kernels.window_attention.reference import relative_position_bias, shift_mask


def indexed_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The published form: an index of pairs, looked up in the table."""
    h, w = window
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    index = (rows[:, None] - rows[None] + h - 1) * (2 * w - 1)
    index = index + columns[:, None] - columns[None] + w - 1
    return table[index.flatten()].view(h * w, h * w, -1).permute(2, 0, 1)


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 5), (7, 7)])
def test_relative_position_bias(window: tuple[int, int]) -> None:
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    ours = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    bias, expected = relative_position_bias(ours, window), indexed_bias(theirs, window)
    assert torch.equal(bias, expected)
    weight = torch.randn_like(bias)
    (bias * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_shift_mask_keeps_apart_what_was_not_adjacent() -> None:
    mask = shift_mask((4, 8), (4, 4), (2, 2))
    assert mask.shape == (2, 16, 16)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    # before the roll, token (r, c) of window n was at row (r + 2) % 4 and column (4n + c + 2) % 8
    for n in range(2):
        for a in range(16):
            for b in range(16):
                (ra, ca), (rb, cb) = divmod(a, 4), divmod(b, 4)
                wrapped_rows = (ra + 2 >= 4) != (rb + 2 >= 4)
                wrapped_columns = (4 * n + ca + 2 >= 8) != (4 * n + cb + 2 >= 8)
                assert (mask[n, a, b] != 0) == (wrapped_rows or wrapped_columns)
