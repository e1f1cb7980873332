"""Wraps a model for its calls: DistributedDataParallel, synchronised batch norms, torch.compile."""

import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn

from simmim.distributed import World
from simmim.training import sync_batch_norm as batch_norm


def wrap(
    model: nn.Module,
    world: World,
    *,
    sync_batch_norm: bool,
    compile: bool,
    for_graph: bool = False,
) -> nn.Module:
    """Wrap the model for its calls; several processes use DistributedDataParallel.

    Args:
        model: the model on the world's device; its parameters stay the same objects.
        world: this process.
        sync_batch_norm: whether batch norms take the statistics of the whole batch.
        compile: whether torch.compile compiles the model.
        for_graph: whether a CUDA graph is to hold the step: gradients are then summed on
            `step_stream`, and not on the default stream, which no graph may hold.
    """
    wrapped = model
    if world.size > 1:
        on_stream: Any = nullcontext()
        if for_graph and world.device.type == "cuda":
            on_stream = torch.cuda.stream(step_stream(world.device))
        with on_stream:
            wrapped = _distributed(model, world, sync_batch_norm)
    return torch.compile(wrapped) if compile else wrapped  # type: ignore[return-value]


@cache
def step_stream(device: torch.device) -> Any:
    """The stream of a CUDA device on which steps are made until a graph holds them."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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
