"""Samples make arrays, each by its number; a producer makes batches of them."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.data.decode import UnreadableImage
from simmim.data.source import Source, is_machine_fault
from simmim.data.views import View


class Samples(Protocol):
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


class SourceSamples:
    """The view of every image of a source; see `Samples`.

    Args:
        source: encoded images.
        view: makes the arrays.
    """

    def __init__(self, source: Source, view: View) -> None:
        self.source, self.view = source, view
        self.shape, self.dtype = view.shape, view.dtype

    def fill(self, out: NDArray[Any], epoch: int, sample: int) -> str:
        """See `Samples`; raises OSError where the machine, and no image, is at fault."""
        try:
            self.view.fill(out, self.source.read(sample), epoch, sample)
        except (UnreadableImage, OSError) as error:
            if is_machine_fault(error):
                raise
            out[...] = 0
            return (error.strerror if isinstance(error, OSError) else None) or str(error)
        return ""

    def name(self, sample: int) -> str:
        """The image's place below the folder, or in which shard."""
        return self.source.names[sample]


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


class InlineProducer:
    """Fills micro-batches in this process; a `Producer`."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """See `Producer`."""
        for batch in places:
            images = np.zeros((len(batch), *self.samples.shape), self.samples.dtype)
            problems = []
            for slot, (epoch, sample) in enumerate(batch):
                reason = self.samples.fill(images[slot], epoch, sample)
                if reason:
                    problems.append((slot, reason))
            yield Filled(torch.from_numpy(images), problems)
