"""Relative position tables of other windows: the published positions, and splines through them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import INDEX
from simmim.downstream.position_tables import (
    remap_table,
    resampling,
    source_positions,
    spline_matrix,
)


@pytest.mark.parametrize(
    ("sides", "entry", "key"),
    [((6, 7), "handover-swin-w6-to-w7", "11->13"), ((4, 6), "handover-vit-4x4-to-6x6", "7->11")],
)
def test_positions_are_the_published_ones(sides: tuple[int, int], entry: str, key: str) -> None:
    expected = INDEX[entry]["interpolation"]["per_table_size"][key]
    positions = source_positions(*sides)
    half = expected["source_positions_positive_half"]
    assert positions[len(positions) // 2 :] == pytest.approx(half, rel=1e-12)
    assert np.array_equal(positions, -positions[::-1])


def test_the_published_ratio_of_the_large_model() -> None:
    positions = source_positions(12, 14)
    assert positions[-1] - positions[-2] == pytest.approx(1.032893**10, rel=1e-5)
    assert positions[-1] == pytest.approx(13.0, abs=1e-4)


def test_ratios_are_searched_between_the_published_ends() -> None:
    # a smaller window asks for a ratio below 1.01, a much larger one for more than 1.5
    assert source_positions(6, 4)[-1] == pytest.approx(sum(1.01**n for n in range(5)), rel=1e-5)
    assert source_positions(3, 14)[-1] == pytest.approx(1 + 1.5, rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_splines_reproduce_cubics_and_their_own_points(n: int) -> None:
    positions = np.cumsum(np.linspace(1.0, 2.0, n))
    wanted = np.linspace(positions[0], positions[-1], 13)
    degree = min(n - 1, 3)
    values = np.polyval([0.3, -1.1, 0.7, 2.0][3 - degree :], positions)
    expected = np.polyval([0.3, -1.1, 0.7, 2.0][3 - degree :], wanted)
    np.testing.assert_allclose(spline_matrix(positions, wanted) @ values, expected, rtol=1e-9)
    np.testing.assert_allclose(spline_matrix(positions, positions), np.eye(n), atol=1e-12)


def test_splines_are_those_of_scipy() -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    draw = np.random.default_rng(0)
    positions, values = np.cumsum(draw.uniform(0.5, 2, 9)), draw.normal(size=(9, 4))
    wanted = np.linspace(positions[0], positions[-1], 41)
    expected = interpolate.CubicSpline(positions, values, bc_type="not-a-knot")(wanted)
    np.testing.assert_allclose(spline_matrix(positions, wanted) @ values, expected, atol=1e-12)


def test_offsets_beyond_the_outermost_position_take_its_value() -> None:
    # positions -1, 0, 1 of a window of 2 tokens, read at -5 … 5
    found = resampling(2, 6)
    np.testing.assert_allclose(found[:5], np.tile([1.0, 0, 0], (5, 1)), atol=1e-12)
    np.testing.assert_allclose(found[5], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(found[6:], np.tile([0, 0, 1.0], (5, 1)), atol=1e-12)


def table(window: tuple[int, int], seed: int = 0) -> Tensor:
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", [(2, 2), (7, 7), (6, 9), (9, 4), (14, 14)])
@pytest.mark.parametrize("source", [(6, 6), (4, 7), (2, 3), (1, 5)])
def test_tables_of_any_window(source: tuple[int, int], target: tuple[int, int]) -> None:
    moved = remap_table(table(source), source, target)
    assert moved.shape == ((2 * target[0] - 1) * (2 * target[1] - 1), 3)
    assert moved.isfinite().all()
    assert torch.allclose(
        remap_table(torch.full_like(table(source), 0.7), source, target), torch.tensor(0.7)
    )
    # the value of no offset stays, and mirrored tables stay mirrored
    middle = moved.view(2 * target[0] - 1, 2 * target[1] - 1, 3)[target[0] - 1, target[1] - 1]
    rows, columns = 2 * source[0] - 1, 2 * source[1] - 1
    before = table(source).view(rows, columns, 3)
    assert torch.allclose(middle, before[source[0] - 1, source[1] - 1], atol=1e-6)
    mirrored = remap_table(before.flip(1).reshape(-1, 3), source, target)
    shape = (2 * target[0] - 1, 2 * target[1] - 1, 3)
    assert torch.allclose(mirrored.view(shape), moved.view(shape).flip(1), atol=1e-6)
    transposed = remap_table(
        before.transpose(0, 1).reshape(-1, 3), source[::-1], target[::-1]
    ).view(shape[1], shape[0], 3)
    assert torch.allclose(transposed.transpose(0, 1), moved.view(shape), atol=1e-6)


def test_every_axis_is_resampled_by_itself() -> None:
    before = table((3, 5)).view(5, 9, 3).double()
    moved = remap_table(before.reshape(-1, 3), (3, 5), (4, 7)).view(7, 13, 3)
    expected = np.einsum("ai,ijn,bj->abn", resampling(3, 4), before.numpy(), resampling(5, 7))
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_table_keeps_its_type(dtype: torch.dtype) -> None:
    moved = remap_table(table((4, 4)).to(dtype), (4, 4), (6, 6))
    assert moved.dtype == dtype
    exact = remap_table(table((4, 4)).to(dtype).double(), (4, 4), (6, 6))
    assert torch.equal(moved, exact.to(dtype))


def test_equal_windows_change_nothing() -> None:
    assert torch.equal(remap_table(table((5, 3)), (5, 3), (5, 3)), table((5, 3)))
    assert np.array_equal(resampling(3, 3), np.eye(5))
    with pytest.raises(ValueError, match=r"position table \(81, 3\) is not of a window of 6×6"):
        remap_table(table((5, 5)), (6, 6), (7, 7))
    with pytest.raises(ValueError, match="is not of a window of 5×5"):
        remap_table(table((5, 5))[:, 0], (5, 5), (7, 7))
