"""The order of samples over a run."""

import pytest

from simmim.data.order import STREAM, MicroBatches, SampleOrder
from simmim_kernels.splitmix import fold, permutation

# of seven images with seed 3: two epochs
PINNED = [
    *[(0, sample) for sample in (4, 5, 6, 0, 3, 1, 2)],
    *[(1, sample) for sample in (4, 3, 0, 5, 6, 1, 2)],
]


def test_order_visits_everything_once_an_epoch() -> None:
    order = SampleOrder(10, seed=3)
    places = [order.at(p) for p in range(30)]
    epochs = [[sample for epoch, sample in places if epoch == e] for e in range(3)]
    assert all(sorted(samples) == list(range(10)) for samples in epochs)
    assert epochs[0] != epochs[1]
    assert [SampleOrder(10, 3).at(p) for p in range(30)] == places
    assert [SampleOrder(10, 4).at(p) for p in range(30)] != places
    assert len(MicroBatches(order, 3, 2, 0, 1, 2, 5)) == 6


def test_the_order_follows_the_seed_and_the_epoch_for_good() -> None:
    """Changing it would break resuming: a run would see some images twice and others not at all."""
    order = SampleOrder(7, seed=3)
    assert [order.at(position) for position in range(14)] == PINNED
    for epoch in (5, 2):  # not only forwards
        expected = permutation(fold(STREAM, 3, epoch), 7).tolist()
        found = [order.at(7 * epoch + offset) for offset in range(7)]
        assert found == [(epoch, sample) for sample in expected]


def test_a_position_is_found_wherever_one_begins() -> None:
    whole = SampleOrder(10, seed=3)
    places = [whole.at(position) for position in range(40)]
    assert [SampleOrder(10, 3).at(position) for position in range(40)] == places
    assert SampleOrder(10, 3).at(37) == places[37]


@pytest.mark.parametrize(("micro_batch", "accumulation", "size"), [(2, 1, 1), (2, 3, 2), (5, 2, 3)])
def test_micro_batches_cut_the_order_into_pieces_one_after_another(
    micro_batch: int, accumulation: int, size: int
) -> None:
    """First all processes' first micro-batch of a step, then all their second one."""
    order, first, last = SampleOrder(11, seed=5), 3, 6
    ranks = [
        list(MicroBatches(order, micro_batch, accumulation, rank, size, first, last))
        for rank in range(size)
    ]
    assert [len(batches) for batches in ranks] == [(last - first) * accumulation] * size
    in_turn = [place for batches in zip(*ranks) for batch in batches for place in batch]
    per_step = micro_batch * accumulation * size
    assert in_turn == [order.at(p) for p in range(first * per_step, last * per_step)]


@pytest.mark.parametrize(("first", "last", "count"), [(0, 0, 0), (4, 2, 0), (2, 4, 6)])
def test_the_number_of_micro_batches(first: int, last: int, count: int) -> None:
    batches = MicroBatches(SampleOrder(4, 0), 2, 3, 0, 1, first, last)
    assert len(batches) == len(list(batches)) == count
