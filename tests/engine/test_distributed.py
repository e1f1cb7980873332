"""The collectives of one process are its own values, and devices that are not there are refused."""

import pytest
import torch

from simmim import distributed
from simmim.distributed import World
from simmim.errors import RunError
from small_run import CPU

ALONE = World(0, 1, CPU)


def test_alone_every_collective_gives_its_own_value() -> None:
    value = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_sum(value, ALONE) is value
    assert distributed.broadcast_object("a", ALONE) == "a"
    assert distributed.gather_objects("a", ALONE) == ["a"]


def test_a_process_alone_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.init("cpu")
    assert world == ALONE
    assert world.is_main
    assert not World(1, 2, CPU).is_main
    distributed.finish(world)


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match=r"device=cuda, but torch sees no CUDA device"):
        distributed.init("cuda")
    assert distributed.init("auto").device == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RunError, match=r"process 2 .* there are 2; lower --nproc-per-node"):
        distributed.init("cuda")
