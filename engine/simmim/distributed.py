"""One process per device: who this process is, and the few collectives the engine needs."""

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from simmim.environment import Launch
from simmim.errors import RunError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0


def init(device: str) -> World:
    """Join the process group that torchrun set up, or stand alone.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        RunError: CUDA was asked for and is not there, or has fewer devices than processes.
    """
    launch = Launch.of_environment()
    rank, size, local_rank = launch.rank, launch.size, launch.local_rank
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("device=cuda, but torch sees no CUDA device; see `simmim doctor`")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise RunError(
                f"process {local_rank} of this machine has no device: there are "
                f"{torch.cuda.device_count()}; lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        # float32 without TF32, for parity with the published numbers
        torch.backends.cudnn.allow_tf32 = False
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if size > 1:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            timeout=timedelta(minutes=30),
            device_id=chosen if use_cuda else None,
        )
    return World(rank, size, chosen)


def finish(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum of `tensor` over all processes, in place; stays on the device."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: object, world: World) -> object:
    """Return rank 0's value in every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def gather_objects(value: T, world: World) -> list[T]:
    """Return the values of all processes, in order of rank, in every process."""
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    return cast(list[T], values)
