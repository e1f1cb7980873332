"""A training state and batches small enough for unit tests."""

import torch
from torch import Tensor

from simmim.command_line import load
from simmim.data.loader import Batch
from simmim.distributed import World
from simmim.pretrain import build_state
from simmim.step import TrainState

CPU = torch.device("cpu")


def make_state(*flags: str) -> TrainState:
    config = load(["smoke", "--data.path=x", "--schedule.warmup_steps=1", *flags])
    return build_state(config, 100, World(0, 1, CPU))


def make_batch(first: int, size: int, step: int = 0) -> Batch:
    ids = torch.arange(first, first + size)
    generator = torch.Generator().manual_seed(1000 * step)
    pixels = torch.randint(0, 256, (64, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return Batch(pixels[first : first + size], ids, torch.full((size,), step), size)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.model.state_dict().items()}
