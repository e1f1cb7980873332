"""The order of samples over a run."""

from simmim.data.order import MicroBatches, SampleOrder


def test_order_visits_everything_once_an_epoch() -> None:
    order = SampleOrder(10, seed=3)
    places = [order.at(p) for p in range(30)]
    epochs = [[sample for epoch, sample in places if epoch == e] for e in range(3)]
    assert all(sorted(samples) == list(range(10)) for samples in epochs)
    assert epochs[0] != epochs[1]
    assert [SampleOrder(10, 3).at(p) for p in range(30)] == places
    assert [SampleOrder(10, 4).at(p) for p in range(30)] != places
    assert len(MicroBatches(order, 3, 2, 0, 1, 2, 5)) == 6
