"""Relative position tables for another window: the published interpolation, in float64 and NumPy.

A table holds a value for every offset between two tokens of a window. Small offsets matter most.
The values are therefore placed at positions that grow geometrically (0, ±1, ±(1+q), ±(1+q+q²), …),
with q chosen so that the outermost position is the outermost offset of the new window. A cubic
spline through them along both axes, with not-a-knot ends and constant beyond them, is then read at
whole numbers.

S sides of the table (2·window - 1), N heads.
Source: microsoft/SimMIM utils.py (remap_pretrained_keys_swin), whose scipy.interpolate.interp2d is
gone since SciPy 1.14.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# As published, the ratio q is searched between these, until it is known to this precision.
_LOWEST_RATIO, _HIGHEST_RATIO, _PRECISION = 1.01, 1.5, 1e-6

Float64 = NDArray[np.float64]


def remap_table(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A position table for another window.

    Args:
        table: [S₁·S₂, N], rows by (vertical, horizontal) offset.
        source: (vertical, horizontal) sides of its window, in tokens.
        target: (vertical, horizontal) sides of the new window.

    Returns:
        [(2·target₁-1)·(2·target₂-1), N], in the table's dtype; the table itself where the windows
        are equal.

    Raises:
        ValueError: the table has another number of rows than its window asks for.
    """
    old = tuple(2 * side - 1 for side in source)
    if table.dim() != 2 or len(table) != old[0] * old[1]:
        raise ValueError(
            f"a position table {tuple(table.shape)} is not of a window of {source[0]}×{source[1]}"
        )
    if source == target:
        return table
    values = table.detach().double().cpu().numpy().reshape(*old, -1)
    vertical, horizontal = (resampling(side, new) for side, new in zip(source, target))
    moved = np.einsum("ai,ijn,bj->abn", vertical, values, horizontal, optimize=True)
    return torch.from_numpy(moved.reshape(-1, values.shape[-1])).to(table.dtype)


def resampling(source: int, target: int) -> Float64:
    """The linear map between offsets of two windows on one axis, [2·target-1, 2·source-1]."""
    if source == target:
        return np.eye(2 * source - 1)
    positions = source_positions(source, target)
    wanted = np.arange(1 - target, target, dtype=np.float64)
    return spline_matrix(positions, np.clip(wanted, positions[0], positions[-1]))


def source_positions(source: int, target: int) -> Float64:
    """Where the offsets of a window lie among those of another, [2·source-1], ascending."""
    steps = source - 1
    low, high, ratio = _LOWEST_RATIO, _HIGHEST_RATIO, 1.0
    while high - low > _PRECISION:
        ratio = (low + high) / 2.0
        if (1.0 - ratio**steps) / (1.0 - ratio) > target - 1:
            high = ratio
        else:
            low = ratio
    outward = np.cumsum(ratio ** np.arange(steps))
    return np.concatenate([-outward[::-1], [0.0], outward])


def spline_matrix(positions: Float64, wanted: Float64) -> Float64:
    """Weights of the cubic spline with not-a-knot ends through values at `positions`.

    Fewer than four positions give the parabola, line or constant through them.

    Args:
        positions: [n], ascending.
        wanted: [m], between the first and the last position.

    Returns:
        [m, n]: the spline at `wanted` is this matrix times the values.
    """
    n = len(positions)
    if n < 4:
        columns = [
            np.prod(
                [
                    (wanted - positions[j]) / (positions[i] - positions[j])
                    for j in range(n)
                    if j != i
                ],
                axis=0,
            )
            * np.ones_like(wanted)
            for i in range(n)
        ]
        return np.stack(columns, axis=1)
    h = np.diff(positions)
    # second derivatives at the positions: equations[k] · curvature = slopes[k] · values
    equations, slopes = np.zeros((n, n)), np.zeros((n, n))
    for k in range(1, n - 1):
        equations[k, k - 1 : k + 2] = h[k - 1], 2 * (h[k - 1] + h[k]), h[k]
        slopes[k, k - 1 : k + 2] = 6 / h[k - 1], -6 / h[k - 1] - 6 / h[k], 6 / h[k]
    # the third derivative does not jump at the second position from either end
    equations[0, :3] = -1 / h[0], 1 / h[0] + 1 / h[1], -1 / h[1]
    equations[-1, -3:] = -1 / h[-2], 1 / h[-2] + 1 / h[-1], -1 / h[-1]
    curvature = np.linalg.solve(equations, slopes)
    left = np.clip(np.searchsorted(positions, wanted, side="right") - 1, 0, n - 2)
    width = h[left]
    b = (wanted - positions[left]) / width
    a = 1.0 - b
    identity = np.eye(n)
    bent = ((a**3 - a) * width**2 / 6)[:, None] * curvature[left]
    bent += ((b**3 - b) * width**2 / 6)[:, None] * curvature[left + 1]
    return a[:, None] * identity[left] + b[:, None] * identity[left + 1] + bent
