"""Samples by their numbers, and what an unreadable one leaves: zeros and a reason."""

import errno

import numpy as np
import pytest

from simmim.data.producer import InlineProducer, SourceSamples
from stand_in_images import StandInSource, StandInView


class FailingSource(StandInSource):
    """Raises `error` for every image."""

    def __init__(self, error: OSError) -> None:
        super().__init__(3)
        self.error = error

    def read(self, index: int) -> bytes:
        raise self.error


def test_a_sample_is_the_view_of_its_image_in_its_epoch() -> None:
    samples = SourceSamples(StandInSource(9), StandInView())
    assert (samples.shape, samples.dtype) == ((3,), "int32")
    out = np.zeros(3, np.int32)
    assert samples.fill(out, 4, 7) == ""
    assert out.tolist() == [8, 4, 7]
    assert samples.name(7) == "7.jpg"


def test_an_unreadable_image_leaves_zeros_and_a_reason() -> None:
    samples = SourceSamples(StandInSource(9, broken={7}), StandInView())
    out = np.full(3, 5, np.int32)
    assert samples.fill(out, 4, 7) == "7 is broken"
    assert out.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
            "No such file or directory",
        ),
        (OSError("not a regular file"), "not a regular file"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_unreadable_image(error: OSError, reason: str) -> None:
    out = np.full(3, 5, np.int32)
    assert SourceSamples(FailingSource(error), StandInView()).fill(out, 0, 1) == reason
    assert out.tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_descriptors_or_memory_is_no_unreadable_image(number: int) -> None:
    samples = SourceSamples(FailingSource(OSError(number, "out of it")), StandInView())
    with pytest.raises(OSError, match="out of it"):
        samples.fill(np.zeros(3, np.int32), 0, 1)


def test_batches_are_filled_in_order() -> None:
    producer = InlineProducer(SourceSamples(StandInSource(9, broken={2, 6}), StandInView()))
    first, second = producer.batches([[(0, 4), (0, 2), (1, 8)], [(3, 6), (3, 0)]])
    assert first.image.tolist() == [[5, 0, 4], [0, 0, 0], [9, 1, 8]]
    assert first.problems == [(1, "2 is broken")]
    assert second.image.tolist() == [[0, 0, 0], [1, 3, 0]]
    assert second.problems == [(0, "6 is broken")]
