"""Micro-batches by a stand-in for DALI: order, sub-batches, failures and what is read ahead."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines import AUGMENTATION, CPU
from simmim.data.dali.batches import MicroBatch, Pass
from simmim.data.dali.readers import Read, Readers
from simmim.data.dali.samples import PreparedSample
from simmim.data.source import PackedStrings
from simmim.errors import DataError


class StandIn:
    """Fills a view with its sample's number; fails where it is told to.

    Attributes:
        given: the samples of every sub-batch, in order.
        fails: sample → what is raised where its sub-batch is collected.
    """

    augmentation, device = AUGMENTATION, CPU

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.work: list[list[PreparedSample]] = []
        self.fails: dict[int, str] = {}
        self.rebuilt = self.most = 0

    def schedule(self, samples: list[PreparedSample]) -> None:
        self.given.append([sample.sample for sample in samples])
        self.work.append(samples)
        self.most = max(self.most, len(self.work))

    def collect(self, image: Tensor, slots: list[int]) -> None:
        samples = self.work.pop(0)
        for place, sample in enumerate(samples):
            if sample.sample in self.fails:
                raise RuntimeError(self.fails[sample.sample].format(place))
        for slot, sample in zip(slots, samples, strict=True):
            image[slot] = sample.sample

    def rebuild(self) -> None:
        self.work.clear()
        self.rebuilt += 1


class StandInPreparation:
    """Samples of 10 pixels and 4 bytes; those from 100 on are made here, as 200 + their number.

    Attributes:
        read: what was prepared, in order.
        redone: what was made here after a failure.
    """

    def __init__(self) -> None:
        self.source = type("Source", (), {"names": PackedStrings([f"{n}.jpg" for n in range(300)])})
        self.made_here: set[int] = set()
        self.read: list[int] = []
        self.redone: list[int] = []
        self.hanging: threading.Event | None = None

    def prepare(self, epoch: int, sample: int) -> PreparedSample:
        self.read.append(sample)
        if sample == 99 and self.hanging:
            self.hanging.wait()
        if sample == 150:
            return PreparedSample(epoch, sample, problem="broken")
        if sample >= 100:
            return self.view(epoch, sample, sample)
        return PreparedSample(epoch, sample, b"data", 10)

    def make_here(self, epoch: int, sample: int, data: bytes) -> PreparedSample:
        assert data == b"data"
        self.redone.append(sample)
        return self.view(epoch, sample, 200 + sample)

    def view(self, epoch: int, sample: int, value: int) -> PreparedSample:
        view = torch.full((*AUGMENTATION.size, 3), value, dtype=torch.uint8).numpy()
        return PreparedSample(epoch, sample, view=view)


@pytest.fixture
def readers() -> Iterator[Readers[PreparedSample]]:
    made: Readers[PreparedSample] = Readers(2)
    yield made
    made.close()


@pytest.fixture
def made(readers: Readers[PreparedSample]) -> Any:
    def make(**options: Any) -> tuple[Pass, StandIn, StandInPreparation, list[str]]:
        decoder, preparation, said = StandIn(), StandInPreparation(), list[str]()
        settings = {"sub_batch_pixels": 30, "prefetch": 1, "timeout_s": 60.0} | options
        made = Pass(preparation, readers, decoder, report=said.append, **settings)  # type: ignore[arg-type]
        return made, decoder, preparation, said

    return make


def numbers(image: Tensor) -> list[int]:
    assert (image == image[:, :1, :1, :1]).all()
    return image[:, 0, 0, 0].tolist()


def places(*batches: range | list[int]) -> list[list[tuple[int, int]]]:
    return [[(0, sample) for sample in batch] for batch in batches]


def test_batches_come_in_order_whoever_makes_their_views(made: Any) -> None:
    tested, decoder, _, said = made()
    filled = list(tested.run(places([1, 100, 2, 150], range(3, 8), [101])))
    assert [numbers(batch.image) for batch in filled] == [[1, 100, 2, 0], [3, 4, 5, 6, 7], [101]]
    assert [batch.problems for batch in filled] == [[(3, "broken")], [], []]
    assert decoder.given == [[1, 2], [3, 4, 5], [6, 7]]  # 30 pixels are three images
    assert decoder.most == 2
    assert not said


@pytest.mark.parametrize(
    ("pixels", "sizes", "cut"),
    [
        ([10, 10, 10, 10], [4] * 4, [[0, 1, 2], [3]]),
        ([10, 10, 11, 10], [4] * 4, [[0, 1], [2, 3]]),
        ([1, 1, 1, 1], [16, 14, 1, 20], [[0, 1], [2, 3]]),
        ([99, 99, 1, 1], [1] * 4, [[0], [1], [2, 3]]),
        ([29, 1, 1, 29], [1] * 4, [[0, 1], [2, 3]]),
    ],
)
def test_sub_batches_hold_so_many_pixels_and_bytes(
    pixels: list[int], sizes: list[int], cut: list[list[int]]
) -> None:
    samples = [PreparedSample(0, n, bytes(s), p) for n, (p, s) in enumerate(zip(pixels, sizes))]
    batch = MicroBatch([])
    batch.begin(samples, StandIn(), 30)  # type: ignore[arg-type]
    assert list(batch.waiting) == cut
    assert batch.unfinished == len(cut)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_so_many_micro_batches_are_read_ahead(made: Any, prefetch: int) -> None:
    tested, _, _, _ = made(prefetch=prefetch)
    asked: list[int] = []

    def coming() -> Iterator[list[tuple[int, int]]]:
        for number in range(6):
            asked.append(number)
            yield [(0, number)]

    run = tested.run(coming())
    next(run)
    assert asked == list(range(1 + prefetch))
    next(run)
    assert asked == list(range(2 + prefetch))
    run.close()


def test_an_image_that_dali_names_is_made_here_with_its_sub_batch(made: Any) -> None:
    tested, decoder, preparation, said = made()
    decoder.fails = {2: "Error in sample #{}: bad"}
    filled = list(tested.run(places(range(1, 8))))
    assert numbers(filled[0].image) == [201, 202, 203, 4, 5, 6, 7]
    assert preparation.made_here == {2}
    assert sorted(preparation.redone) == [1, 2, 3]
    assert decoder.rebuilt == 1
    assert decoder.given == [[1, 2, 3], [4, 5, 6], [4, 5, 6], [7]]  # what was in work again
    assert said == [
        "DALI cannot decode 2.jpg (Error in sample #1: bad); its batch was decoded here, and it "
        "will be"
    ]


def test_failures_in_a_row_without_a_name_end_the_run(made: Any) -> None:
    tested, decoder, _, said = made()
    decoder.fails = dict.fromkeys((1, 2, 4, 5, 6), "out of memory")
    run = tested.run(places([1], [2], [3], [4], [5], [6]))
    shown = [numbers(next(run).image) for _ in range(5)]
    assert shown == [[201], [202], [3], [204], [205]]  # the third that worked begins a new count
    assert said == ["DALI failed on a batch (out of memory); it was decoded here"] * 4
    with pytest.raises(DataError, match=r"batch after batch \(out of memory\).*dali_memory_mib"):
        next(run)


def test_a_read_without_an_answer_is_given_up_and_its_thread_replaced(
    made: Any, readers: Readers[PreparedSample]
) -> None:
    tested, _, preparation, said = made(timeout_s=0.2)
    preparation.hanging = threading.Event()
    run = tested.run(places([1, 99, 2]))
    filled = next(run)
    assert numbers(filled.image) == [1, 0, 2]
    assert filled.problems == [(1, "no answer for 0 s")]
    assert said == ["a read gave no answer for 0 s at 99.jpg; given up"]
    assert len(readers.threads) == 3
    preparation.hanging.set()


def test_a_read_that_waits_for_a_thread_is_not_silent(made: Any) -> None:
    tested, _, _, _ = made(timeout_s=0.05)
    read: Read[PreparedSample] = Read(lambda: None, (0, 1))  # type: ignore[arg-type, return-value]
    timer = threading.Timer(0.3, lambda: read.future.set_result(PreparedSample(0, 1)))
    timer.start()
    assert tested._answer(read) == PreparedSample(0, 1)
    timer.join()
