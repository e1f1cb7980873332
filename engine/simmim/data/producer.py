"""What stands between a list of samples and their pixels: views fill slots, a producer batches."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor


class Views(Protocol):
    """Makes the array of one sample, a pure function of (epoch, sample).

    Attributes:
        shape: of one sample's array.
        dtype: NumPy's name of its type.
    """

    shape: tuple[int, ...]
    dtype: str

    def fill(self, out: NDArray[Any], epoch: int, sample: int) -> str:
        """Write a sample to `out`; returns why there is none ("" where there is one)."""

    def name(self, sample: int) -> str:
        """What messages call a sample."""


@dataclass(frozen=True)
class Filled:
    """A micro-batch of arrays.

    Attributes:
        image: [B, *shape]; zeros in the slots named by `problems`. Valid until the producer is
            asked for the next one.
        problems: (slot, reason) of the samples that could not be made.
    """

    image: Tensor
    problems: list[tuple[int, str]]


class Producer(Protocol):
    """Fills micro-batches, in order."""

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """One `Filled` for every list of (epoch, sample); closing it ends what it started."""
