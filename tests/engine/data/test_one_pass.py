"""One pass over images: each once, whichever process takes it."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from simmim.data import one_pass as one_pass_module
from simmim.data.batch import Batch
from simmim.data.one_pass import one_pass
from simmim.data.producer import Filled, InlineProducer, SourceSamples
from simmim.distributed import World
from stand_in_images import StandInSource, StandInView

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def ids_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_once_in_order(workers: int) -> None:
    source = StandInSource(7)
    batches = list(one_pass(source, StandInView(), ALONE, batch_size=3, workers=workers))
    assert ids_of(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    for batch in batches:
        assert batch.image.tolist() == [[1 + sample, 0, sample] for sample in batch.ids.tolist()]
        assert batch.epochs.tolist() == [0] * len(batch.ids)
        assert batch.num_valid == len(batch.ids)


def test_processes_take_turns() -> None:
    parts = [
        ids_of(
            one_pass(StandInSource(8), StandInView(), World(rank, 3, CPU), batch_size=2, workers=0)
        )
        for rank in range(3)
    ]
    assert parts == [[[0, 3], [6]], [[1, 4], [7]], [[2, 5]]]


def test_the_images_that_are_asked_for_come_in_their_order() -> None:
    for samples in ([5, 2, 9, 0], np.array([5, 2, 9, 0], np.int32)):
        found = one_pass(
            StandInSource(10), StandInView(), ALONE, batch_size=3, workers=0, samples=samples
        )
        assert ids_of(found) == [[5, 2, 9], [0]]
    assert not list(
        one_pass(StandInSource(3), StandInView(), World(4, 5, CPU), batch_size=2, workers=0)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_empty_slot(workers: int) -> None:
    noted: list[tuple[int, str]] = []
    batches = list(
        one_pass(
            StandInSource(8, broken={2, 3, 7}),
            StandInView(),
            ALONE,
            batch_size=3,
            workers=workers,
            samples=[7, 6, 5, 4, 3, 2],
            note_problem=lambda sample, reason: noted.append((sample, reason)),
        )
    )
    assert ids_of(batches) == [[-1, 6, 5], [4, -1, -1]]
    assert [batch.num_valid for batch in batches] == [2, 1]
    assert batches[0].image.tolist() == [[0, 0, 0], [7, 0, 6], [6, 0, 5]]
    assert noted == [(sample, f"{sample} is broken") for sample in (7, 3, 2)]


def test_nobody_has_to_listen() -> None:
    found = one_pass(StandInSource(2, broken={0}), StandInView(), ALONE, batch_size=2, workers=0)
    assert ids_of(found) == [[-1, 1]]


class Noted(InlineProducer):
    """Stands in for processes; remembers what they are told."""

    told: dict[str, Any]
    closed = 0

    def __init__(self, samples: SourceSamples, micro_batch: int, **named: Any) -> None:
        super().__init__(samples)
        Noted.told = named | {"micro_batch": micro_batch, "view": samples.view}

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Iterator[Filled]:  # type: ignore[override]
        memory = torch.zeros(9, 3, dtype=torch.int32)
        try:
            for filled in super().batches(places):
                image = memory[: len(filled.image)]
                yield Filled(image.copy_(filled.image), filled.problems)
        finally:
            Noted.closed += 1


def test_what_workers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass_module, "WorkerPool", Noted)
    monkeypatch.setattr(one_pass_module, "default_workers", lambda world: 5)
    view, report = StandInView(), [].append
    settings: dict[str, Any] = {"report": report, "timeout_s": 33.0}
    for batch_size, workers, given in ((4, 3, 3), (20, -1, 5)):
        list(
            one_pass(
                StandInSource(9), view, ALONE, batch_size=batch_size, workers=workers, **settings
            )
        )
        # no more memory than one pass can use
        micro_batch = min(batch_size, 9)
        told = {"micro_batch": micro_batch, "view": view, "workers": given, "prefetch": 2}
        assert Noted.told == told | settings
    list(one_pass(StandInSource(9), view, ALONE, batch_size=4, workers=2, samples=[]))
    assert Noted.told["micro_batch"] == 1


def test_a_batch_stays_when_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer writes to the same memory again; it ends with the loop, however that ends."""
    monkeypatch.setattr(one_pass_module, "WorkerPool", Noted)
    before = Noted.closed
    batches = list(one_pass(StandInSource(4), StandInView(), ALONE, batch_size=2, workers=1))
    assert [batch.image[:, 0].tolist() for batch in batches] == [[1, 2], [3, 4]]
    begun = one_pass(StandInSource(4), StandInView(), ALONE, batch_size=2, workers=1)
    next(begun)
    assert Noted.closed == before + 1
    begun.close()
    assert Noted.closed == before + 2
