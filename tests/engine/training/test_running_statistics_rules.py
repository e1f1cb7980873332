"""Buffers of batch norms after a step: the mean of all processes, or what they were before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simmim.distributed import World
from simmim.training import running_statistics

CPU = torch.device("cpu")
WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def norms(widths: list[int], seed: int) -> nn.Sequential:
    """Batch norms and a layer whose buffer is none of theirs, with random buffers."""
    generator = torch.Generator().manual_seed(seed)
    other = nn.Linear(1, 1)
    other.register_buffer("count", torch.zeros(1))
    model = nn.Sequential(*(nn.BatchNorm1d(width) for width in widths), other)
    _shake(model, generator)
    return model


def _shake(model: nn.Module, generator: torch.Generator) -> None:
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) * 100)


def _copies(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@given(widths=WIDTHS, seeds=st.lists(st.integers(0, 999), min_size=1, max_size=4), ok=st.booleans())
def test_a_step_that_counts_gives_the_mean_and_another_changes_nothing(
    widths: list[int], seeds: list[int], ok: bool
) -> None:
    models = [norms(widths, 0) for _ in seeds]
    before = [running_statistics.keep(model) for model in models]
    start = _copies(models[0])
    for model, seed in zip(models, seeds):
        _shake(model, torch.Generator().manual_seed(seed))
    after = [_copies(model) for model in models]
    floats = torch.stack(
        [torch.cat([b.flatten() for b in model[:-1].buffers() if b.is_floating_point()])
         for model in models]
    )  # fmt: skip
    expected = floats.mean(0)
    given_sums: list[Tensor] = []

    def sums(tensor: Tensor, world: World) -> Tensor:
        assert world.size == len(seeds)
        given_sums.append(tensor.clone())
        return tensor.copy_(floats.sum(0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_statistics, "all_reduce_sum", sums)
        for rank, (model, old) in enumerate(zip(models, before)):
            world = World(rank, len(seeds), CPU)
            running_statistics.settle(model, old, torch.tensor(ok), world)
    assert len(given_sums) == (len(seeds) if len(seeds) > 1 else 0)
    assert all(torch.equal(summed, own) for summed, own in zip(given_sums, floats))
    for model, own in zip(models, after):
        buffers = list(model[:-1].buffers())
        if ok:
            merged = torch.cat([b.flatten() for b in buffers if b.is_floating_point()])
            torch.testing.assert_close(merged, expected)
            counts = [(a, b) for a, b in zip(buffers, own) if not b.is_floating_point()]
            assert all(torch.equal(a, b) for a, b in counts)
        else:
            assert all(torch.equal(a, b) for a, b in zip(buffers, start))
        assert torch.equal(model[-1].count, own[-1])
