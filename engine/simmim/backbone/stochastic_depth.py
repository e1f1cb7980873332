"""Stochastic depth (Huang et al., ECCV 2016): residual branches of an image that a step drops.

A step names the samples that it sees. Draws are then functions of (seed, epoch, sample, block),
the same for any number of processes, and nothing has to be seeded. A loop that does not name its
samples draws from torch's generator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from simmim_kernels import random_branch_scales


@dataclass(frozen=True)
class Samples:
    """The images of a forward pass.

    Attributes:
        seed: of the run.
        epochs: int64 [B].
        ids: int64 [B].
        view: number of the view, where images are seen more than once.
    """

    seed: int
    epochs: Tensor
    ids: Tensor
    view: int = 0


_seen: Samples | None = None


@contextmanager
def of_samples(seed: int, epochs: Tensor, ids: Tensor) -> Iterator[None]:
    """Draw as functions of these samples.

    A forward pass inside is of all of them, in order, or of several views one after the other.

    Args:
        seed: of the run.
        epochs: int64 [B].
        ids: int64 [B].
    """
    with _seeing(Samples(seed, epochs, ids)):
        yield


@contextmanager
def of_view(view: int) -> Iterator[None]:
    """Draw anew for another view of the same samples."""
    with _seeing(None if _seen is None else replace(_seen, view=view)):
        yield


@contextmanager
def _seeing(samples: Samples | None) -> Iterator[None]:
    global _seen
    before, _seen = _seen, samples
    try:
        yield
    finally:
        _seen = before


class DropPath(nn.Module):
    """Drops residual branches of images with probability `rate`; scales the rest by 1/(1-rate).

    Args:
        rate: 0 to below 1.
        branches: of the block that this belongs to.

    Attributes:
        block: number of the block in its encoder; see `number_blocks`.
    """

    def __init__(self, rate: float, branches: int = 1) -> None:
        super().__init__()
        self.rate, self.branches, self.block = rate, branches, 0

    def forward(self, x: Tensor) -> Tensor | None:
        """Factors of every branch and image of x, float32 [branches, B]; None if all are 1."""
        if self.rate == 0.0 or not self.training:
            return None
        if _seen is None:
            scale = torch.empty(self.branches, len(x), device=x.device)
            for branch in scale:  # one by one, as earlier versions drew
                branch.bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)
            return scale
        count = len(_seen.ids)
        if count == 0 or len(x) % count:
            raise ValueError(
                f"stochastic depth: {len(x)} images are no views of the {count} samples of the "
                "step; name those that are left: `with stochastic_depth.of_samples(…)`"
            )
        parts = [
            random_branch_scales(
                self.rate,
                self.branches,
                seed=_seen.seed,
                ids=_seen.ids,
                epochs=_seen.epochs,
                block=self.block,
                view=_seen.view + part,
            )
            for part in range(len(x) // count)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


def number_blocks(encoder: nn.Module) -> None:
    """Give every block of an encoder draws of its own."""
    drops = [module for module in encoder.modules() if isinstance(module, DropPath)]
    for number, drop in enumerate(drops):
        drop.block = number


def drop_path_rates(rate: float, num_blocks: int) -> list[float]:
    """The rate of every block: from 0 to `rate`, evenly spaced, both ends included."""
    return [rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]


def branch_of(scales: Tensor | None, branch: int) -> Tensor | None:
    """The factors [B] of one branch of a block."""
    return None if scales is None else scales[branch]
