"""Which sample stands at which position of the run: a pure function of (seed, epoch, sample).

The run is one endless sequence: the permutation of epoch 0, then of epoch 1, and so on. Step s
takes positions s·G … (s+1)·G - 1 of it (G the global batch), so every image is seen exactly once
an epoch, batches may span two epochs, and neither ranks nor workers change anything.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from simmim_kernels.splitmix import fold, permutation

# Keeps the shuffle apart from other uses of the same (seed, epoch).
STREAM = 0x6F726465  # "orde"


class SampleOrder:
    """The order of `num_images` samples over the epochs of a run."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample) at a position of the run."""
        epoch, offset = divmod(position, self.num_images)
        if epoch != self._epoch:
            self._permutation = permutation(fold(STREAM, self.seed, epoch), self.num_images)
            self._epoch = epoch
        return epoch, int(self._permutation[offset])


class MicroBatches:
    """The micro-batches of one process, from a step on, without end: lists of (epoch, sample).

    Args:
        order: the run's order.
        micro_batch: B, images per process and backward pass.
        accumulation_steps: micro-batches of a step.
        rank: this process.
        world_size: number of processes.
        first_step: step to start from.
        last_step: step to stop before.
    """

    def __init__(
        self,
        order: SampleOrder,
        micro_batch: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.order, self.micro_batch = order, micro_batch
        self.accumulation_steps, self.rank, self.world_size = accumulation_steps, rank, world_size
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first_step * self.accumulation_steps
        for number in range(first, first + len(self)):
            start = (number * self.world_size + self.rank) * self.micro_batch
            yield [self.order.at(start + i) for i in range(self.micro_batch)]
