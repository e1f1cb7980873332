"""`pairwise` keeps every pair of values in the ordinary suite, and every combination overall."""

import itertools

import pytest

from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 3), (2, 3, 3), (2, 3, 2, 4), (1, 5, 2)], ids=str)
def test_every_pair_is_ordinary_and_every_combination_is_there(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    parameters = pairwise(*axes)
    assert [p.values for p in parameters] == list(itertools.product(*axes))
    ordinary = [p.values for p in parameters if not p.marks]
    assert all(p.marks[0].name == "slow" for p in parameters if p.marks)
    for left, right in itertools.combinations(range(len(axes)), 2):
        met = {(row[left], row[right]) for row in ordinary}
        assert met == set(itertools.product(axes[left], axes[right]))
    largest, second = sorted(sizes)[:-3:-1]
    assert len(ordinary) <= 1.25 * largest * second
