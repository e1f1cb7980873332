"""Random numbers of keys: one to one, and the same in Python, NumPy and torch."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmim_kernels.splitmix import (
    GAMMA,
    fold,
    fold_into,
    fold_tensor,
    mix,
    mix_tensor,
    permutation,
    signed,
    uniform,
)

BITS = 2**64 - 1
WORDS = st.one_of(st.integers(0, BITS), st.integers(0, 300), st.integers(BITS - 300, BITS))
PARTS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4)


def unmix(z: int) -> int:
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        undone = z
        for _ in range(64 // shift):
            undone = z ^ (undone >> shift)
        z = undone * pow(factor, -1, 2**64) & BITS
    return z


@given(word=WORDS)
def test_mixing_can_be_undone(word: int) -> None:
    assert 0 <= mix(word) <= BITS
    assert unmix(mix(word)) == word


@given(words=st.lists(WORDS, min_size=1, max_size=8))
def test_tensors_are_mixed_as_integers_are(words: list[int]) -> None:
    tensor = torch.tensor([signed(word) for word in words])
    assert mix_tensor(tensor).tolist() == [signed(mix(word)) for word in words]
    assert [word & BITS for word in tensor.tolist()] == words


@given(parts=PARTS, more=PARTS)
def test_folding_takes_one_part_after_the_other(parts: list[int], more: list[int]) -> None:
    key = fold(*parts)
    for part in more:
        key = fold_into(key, part)
    assert key == fold(*parts, *more)
    of_tensor = fold_tensor(fold(*parts), torch.tensor(more))
    assert of_tensor.tolist() == [signed(fold(*parts, part)) for part in more]
    again = fold_tensor(of_tensor, torch.tensor(more))
    assert again.tolist() == [signed(fold(*parts, part, part)) for part in more]


@given(parts=st.lists(st.integers(0, 2**40), min_size=2, max_size=4, unique=True))
def test_the_order_of_parts_counts(parts: list[int]) -> None:
    assert fold(*parts) != fold(*reversed(parts))


@given(key=WORDS, counter=st.integers(0, 10**6))
def test_a_draw_is_its_53_highest_bits(key: int, counter: int) -> None:
    draw = uniform(key, counter)
    assert 0 <= draw < 1
    assert draw * 2**53 == mix(key + (counter + 1) * GAMMA) >> 11


@given(key=WORDS, size=st.integers(0, 300))
def test_a_permutation_has_everything_once_in_the_order_of_its_draws(key: int, size: int) -> None:
    places = permutation(key, size)
    assert places.dtype == np.int64
    draws = [mix(key + (place + 1) * GAMMA) for place in range(size)]
    assert places.tolist() == sorted(range(size), key=lambda place: draws[place])
