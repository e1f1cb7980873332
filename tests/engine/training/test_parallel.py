"""How a model is wrapped: what arrives at DistributedDataParallel and at torch.compile."""

from typing import Any

import pytest
import torch
from torch import nn

from simmim.distributed import World
from simmim.training.parallel import wrap
from simmim.training.sync_batch_norm import CpuSyncBatchNorm
from small_run import CPU


class Wrapper(nn.Module):
    """In place of DistributedDataParallel: keeps what it is given."""

    def __init__(self, module: nn.Module, broadcast_buffers: bool = True, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options | {"broadcast_buffers": broadcast_buffers}


class LaterWrapper(Wrapper):
    """The same under the name that later releases of torch give an option."""

    def __init__(
        self, module: nn.Module, forward_sync_buffers: bool = True, **options: Any
    ) -> None:
        super().__init__(module, forward_sync_buffers, **options)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


ALONE, ONE_OF_TWO = World(0, 1, CPU), World(1, 2, CPU)


def test_one_process_calls_the_model_itself() -> None:
    model = net()
    assert wrap(model, ALONE, sync_batch_norm=True, compile=False) is model
    assert type(model[1]) is nn.BatchNorm2d  # it is the whole batch already


@pytest.mark.parametrize("kind", [Wrapper, LaterWrapper])
@pytest.mark.parametrize("sync", [False, True])
def test_several_processes_share_gradients_and_no_buffers(
    kind: type[Wrapper], sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", kind)
    model = net()
    wrapped = wrap(model, ONE_OF_TWO, sync_batch_norm=sync, compile=False)
    assert type(wrapped) is kind
    assert wrapped.module is model
    assert wrapped.options == {
        "device_ids": None, "gradient_as_bucket_view": True, "broadcast_buffers": False,
    }  # fmt: skip
    assert isinstance(model[1], CpuSyncBatchNorm) == sync


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapper)
    world = World(1, 2, torch.device("cuda", 3))
    wrapped = wrap(net(), world, sync_batch_norm=False, compile=False)
    assert isinstance(wrapped, Wrapper)
    assert wrapped.options["device_ids"] == [3]


def test_what_is_called_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapper)
    compiled: list[Any] = []

    def compile(model: nn.Module) -> str:
        compiled.append(model)
        return "compiled"

    monkeypatch.setattr(torch, "compile", compile)
    model = net()
    assert wrap(model, ALONE, sync_batch_norm=False, compile=True) == "compiled"
    assert wrap(model, ONE_OF_TWO, sync_batch_norm=False, compile=True) == "compiled"
    assert compiled[0] is model
    assert isinstance(compiled[1], Wrapper)
