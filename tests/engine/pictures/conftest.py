"""A run's configuration for pictures of small images, and sources that are made up."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pictured import Squares
from simmim.config.sections import Config


@pytest.fixture
def squares() -> Squares:
    """Forty images of 24 × 24 pixels."""
    return Squares(40)


@pytest.fixture
def configured() -> Callable[..., Config]:
    """configured(seed=3, pictures=2): a run on images of 16 × 16 pixels."""

    def make(seed: int = 0, pictures: int = 4) -> Config:
        whole = Config()
        return replace(
            whole,
            seed=seed,
            data=replace(whole.data, image_size=16),
            log=replace(whole.log, pictures=pictures),
        )

    return make
