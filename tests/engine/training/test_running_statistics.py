"""Running statistics of batch norms: the mean over processes, and those of before if skipped."""

import pytest
import torch
from torch import Tensor, nn

from simmim.distributed import World
from simmim.training import running_statistics
from simmim.training.running_statistics import keep, settle
from small_run import CPU

ALONE = World(0, 1, CPU)


def model() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.LayerNorm(4))


def buffers(of: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in of.named_buffers()}


def step(of: nn.Module) -> None:
    """A forward pass, which moves all statistics."""
    of.train()(torch.randn(2, 3, 4, 4) * 2 + 1)


@pytest.mark.parametrize("finite", [True, False])
def test_a_skipped_step_leaves_no_trace(finite: bool) -> None:
    net = model()
    step(net)
    old, before = buffers(net), keep(net)
    step(net)
    new = buffers(net)
    assert all(not torch.equal(old[name], new[name]) for name in old)
    settle(net, before, torch.tensor(finite), ALONE)
    expected = new if finite else old
    assert all(torch.equal(buffers(net)[name], expected[name]) for name in expected)


def test_processes_agree_on_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of batches, which are integers, are equal anyway and are not averaged."""
    net = model()
    step(net)
    before = keep(net)
    step(net)
    own = buffers(net)
    # three other processes, whose statistics are larger by 4
    monkeypatch.setattr(running_statistics, "all_reduce_sum", lambda t, world: 4 * t + 12)
    settle(net, before, torch.tensor(True), World(1, 4, CPU))
    for name, buffer in buffers(net).items():
        counted = name.endswith("num_batches_tracked")
        torch.testing.assert_close(buffer, own[name] if counted else own[name] + 3)


def test_only_batch_norms_are_kept() -> None:
    net = nn.Sequential(nn.LayerNorm(4))
    net.register_buffer("other", torch.ones(3))
    assert keep(net) == []
    settle(net, [], torch.tensor(False), ALONE)
    assert torch.equal(net.get_buffer("other"), torch.ones(3))
