"""Steps from a CUDA graph: what stands against one, and what is done without.

What is captured, and when, is tested over the stand-in for CUDA (tests/gpu_sim/test_host_run.py).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim.distributed import World
from simmim.errors import ConfigError
from simmim.training import graphed_steps
from simmim.training.graphed_steps import GraphedSteps, reason_against
from small_run import make_batch, make_state

CUDA = torch.device("cuda", 0)


def on_cuda(*flags: str, size: int = 1) -> Any:
    state = make_state(*flags)
    state.world = World(0, size, CUDA)
    return state


@pytest.mark.parametrize(
    ("flags", "size", "reason"),
    [
        ((), 1, None),
        (("--train.cuda_graph=on",), 1, None),
        (("--train.cuda_graph=off",), 1, "train.cuda_graph=off"),
        (("--train.compile=true",), 1, "train.compile is on"),
        ((), 2, None),
    ],
)
def test_what_stands_against_a_graph(
    flags: tuple[str, ...], size: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    assert reason_against(on_cuda(*flags, size=size)) == reason
    assert reason_against(make_state(*flags)) == (
        reason if flags == ("--train.cuda_graph=off",) else "it is for CUDA"
    )


def test_other_backends_of_processes_and_losses_that_change_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    assert reason_against(on_cuda(size=2)) == "processes do not communicate by NCCL"
    state = on_cuda()
    state.loss_of = SimpleNamespace(changes_on_host="views are drawn by the host")
    assert reason_against(state) == "views are drawn by the host"
    state.loss_of.changes_on_host = None
    assert reason_against(state) is None


def test_a_graph_that_is_asked_for_and_cannot_be_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.cuda_graph=on: it is for CUDA"):
        GraphedSteps(make_state("--train.cuda_graph=on"), print)
    assert GraphedSteps(make_state(), print).describe() == "off, it is for CUDA"


@pytest.mark.parametrize(("size", "warm_up"), [(1, 3), (2, 11)])
def test_the_log_says_when_it_begins(
    size: int, warm_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrapped(torch.nn.Module):
        pass

    monkeypatch.setattr(graphed_steps, "step_stream", lambda device: device)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(graphed_steps, "DistributedDataParallel", Wrapped)
    state = on_cuda(size=size)
    if size > 1:
        state.wrapped = Wrapped()
    assert GraphedSteps(state, print).describe() == f"on after {warm_up} steps"


def test_without_a_graph_steps_are_those_of_train_step() -> None:
    told: list[str] = []
    plain, graphed = make_state("--train.steps=4"), make_state("--train.steps=4")
    make_step = GraphedSteps(graphed, told.append)
    for step in range(3):
        batches = [make_batch(0, 4, step)]
        a, b = graphed_steps.train_step(plain, batches), make_step(batches)
        assert torch.equal(a.loss, b.loss)
        assert a.lr == b.lr
    assert graphed.step == 3
    same: list[Tensor] = [*plain.model.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(same, graphed.model.parameters(), strict=True))
    assert told == []
