"""Keyed random numbers: the three forms agree, and equal the published generator."""

import numpy as np
import torch

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


def test_published_sequence() -> None:
    """SplitMix64 from state 1234567: the sequence that every implementation prints."""
    state, found = 1234567, []
    for _ in range(5):
        state += GAMMA
        found.append(mix(state))
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_tensor_form_is_the_integer_form() -> None:
    values = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -987654321]
    mixed = mix_tensor(torch.tensor(values))
    assert mixed.tolist() == [signed(mix(v)) for v in values]
    folded = fold_tensor(fold(7), torch.tensor(values))
    assert folded.tolist() == [signed(fold(7, v)) for v in values]
    twice = fold_tensor(folded, torch.tensor(values).flip(0))
    assert twice.tolist() == [
        signed(fold(7, a, b)) for a, b in zip(values, reversed(values), strict=True)
    ]


def test_permutation() -> None:
    order = permutation(fold(1, 2), 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, permutation(fold(1, 2), 1000))
    assert not np.array_equal(order, permutation(fold(2, 1), 1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    assert permutation(5, 0).tolist() == []


def test_parts_and_draws_are_spelt_out_the_same_everywhere() -> None:
    for key in (0, 1, fold(9), 2**64 - 1):
        assert fold_into(fold(3, key), 8) == fold(3, key, 8)
        assert [uniform(key, i) for i in range(50)] == [
            (mix(key + (i + 1) * GAMMA) >> 11) * 2.0**-53 for i in range(50)
        ]


def test_uniform() -> None:
    draws = np.array([uniform(fold(3), i) for i in range(20_000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(draws.var() - 1 / 12) < 0.003
