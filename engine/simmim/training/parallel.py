"""Wraps a model for its calls: DistributedDataParallel, synchronised batch norms, torch.compile."""

import inspect
from typing import Any

import torch
from torch import nn

from simmim.distributed import World
from simmim.training import sync_batch_norm as batch_norm


def wrap(model: nn.Module, world: World, *, sync_batch_norm: bool, compile: bool) -> nn.Module:
    """Wrap the model for its calls; several processes use DistributedDataParallel.

    Args:
        model: the model on the world's device; its parameters stay the same objects.
        world: this process.
        sync_batch_norm: whether batch norms take the statistics of the whole batch.
        compile: whether torch.compile compiles the model.
    """
    wrapped = model if world.size == 1 else _distributed(model, world, sync_batch_norm)
    return torch.compile(wrapped) if compile else wrapped  # type: ignore[return-value]


def _distributed(model: nn.Module, world: World, sync_batch_norm: bool) -> nn.Module:
    if sync_batch_norm:
        model = batch_norm.convert(model)
    wrapper = nn.parallel.DistributedDataParallel
    # the step itself keeps running statistics equal; later releases of torch have another name
    later = "forward_sync_buffers" in inspect.signature(wrapper).parameters
    unsynced: dict[str, Any] = {"forward_sync_buffers" if later else "broadcast_buffers": False}
    return wrapper(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **unsynced,
    )
