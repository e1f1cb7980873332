"""Parameters of tests with several independent axes."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values, for `pytest.mark.parametrize`.

    Any two values of different axes meet in at least one test of the ordinary suite; combinations
    that only repeat such pairs are marked slow.
    """
    assert len(axes) > 1
    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in combinations}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        row = max(combinations, key=lambda row: len(pairs[row] & missing))
        chosen.add(row)
        missing -= pairs[row]
    return [
        pytest.param(
            *(axis[index] for axis, index in zip(axes, row)),
            marks=() if row in chosen else pytest.mark.slow,
        )
        for row in combinations
    ]
