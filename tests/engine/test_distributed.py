"""The collectives of one process are its own values, and devices that are not there are refused."""

import pytest
import torch
import torch.distributed as dist

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


def test_collectives_span_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second of two processes hears them."""
    world, sources = World(1, 2, CPU), list[int]()

    def broadcast(box: list[object], src: int, device: torch.device) -> None:
        sources.append(src)
        box[0] = "of the first"

    def gather(values: list[object], value: object) -> None:
        values[:] = ["of the first", value]

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(3))
    assert distributed.broadcast_object("own", world) == "of the first"
    assert sources == [0]
    assert distributed.gather_objects("own", world) == ["of the first", "own"]
    assert distributed.all_reduce_sum(torch.tensor(1.0), world) == 4


def test_several_processes_join_a_group_and_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, left = list[str](), list[bool]()
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: joined.append(name))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert distributed.init("cpu") == World(3, 4, CPU)
    assert torch.backends.cudnn.allow_tf32
    world = distributed.init("auto")
    assert world == World(3, 4, torch.device("cuda", 1))
    assert not torch.backends.cudnn.allow_tf32
    assert joined == ["gloo", "nccl"]
    distributed.finish(world)
    assert left == [True]
