"""Batches with empty slots."""

import torch

from simmim.data.batch import Batch


def batch(ids: list[int]) -> Batch:
    numbers = torch.tensor(ids)
    valid = int((numbers >= 0).sum())
    return Batch(numbers[:, None] * 10, numbers, 100 + torch.arange(len(ids)), valid)


def test_empty_slots_are_left_out_and_the_others_keep_their_order() -> None:
    left = batch([-1, 7, -1, 3, 5, -1]).without_empty_slots()
    assert left.ids.tolist() == [7, 3, 5]
    assert left.image[:, 0].tolist() == [70, 30, 50]
    assert left.epochs.tolist() == [101, 103, 104]
    assert left.num_valid == 3


def test_as_many_images_stay_as_are_asked_for() -> None:
    assert batch([-1, 7, -1]).without_empty_slots(at_least=2).ids.tolist() == [7, -1]
    assert batch([-1, 7, -1]).without_empty_slots(at_least=2).num_valid == 1
    nothing = batch([-1, -1]).without_empty_slots()
    assert (nothing.ids.tolist(), nothing.num_valid) == ([-1], 0)


def test_a_batch_without_empty_slots_stays_as_it_is() -> None:
    full = batch([4, 2])
    assert full.without_empty_slots(at_least=1) is full
