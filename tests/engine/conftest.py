"""Weights that several tests read, and one thread for those that compare bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from numerics import load_golden, with_prefix


@pytest.fixture
def official() -> dict[str, Tensor]:
    """A published pre-training checkpoint of a Swin."""
    return with_prefix(load_golden("simmim-swin-p4-w2")[1], "weights/")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
