"""Weights that several tests read."""

import pytest
from torch import Tensor

from numerics import load_golden, with_prefix


@pytest.fixture
def official() -> dict[str, Tensor]:
    return with_prefix(load_golden("simmim-swin-p4-w2")[1], "weights/")
