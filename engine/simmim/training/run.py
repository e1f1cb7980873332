"""A training run while it goes on: the loop drives it, and observers receive it."""

import time

from simmim.config.sections import RunConfig
from simmim.data.loader import Loader
from simmim.data.unreadable import UnreadableImages
from simmim.distributed import World
from simmim.model.image_model import ImageModel
from simmim.run_folder import RunFolder
from simmim.training.log import RunLog
from simmim.training.step import TrainState


class Run:
    """A training run.

    Args:
        state: weights, optimiser, schedule and the step.
        loader: loads the run's images.
        folder: the run's folder, claimed by this process.
        log: shows progress and writes records.
        unreadable: images that could not be read so far.
        saved_step: step of the newest checkpoint; -1 if there is none.

    Attributes:
        total: optimiser steps of the whole run.
    """

    def __init__(
        self,
        state: TrainState,
        loader: Loader,
        folder: RunFolder,
        log: RunLog,
        unreadable: UnreadableImages,
        saved_step: int,
    ) -> None:
        self.state, self.loader, self.folder, self.log = state, loader, folder, log
        self.unreadable, self.saved_step = unreadable, saved_step
        self.total = state.schedule.total_steps
        self.restart_clock()

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.state.config

    @property
    def world(self) -> World:
        """This process."""
        return self.state.world

    @property
    def step(self) -> int:
        """Optimiser steps made so far."""
        return self.state.step

    @property
    def model(self) -> ImageModel:
        """The averaged model if the run keeps an average, else the model that trains."""
        return self.state.averaged or self.state.model

    @property
    def num_images(self) -> int:
        """Images of an epoch."""
        return len(self.loader.source.names)

    def epoch_of(self, step: int) -> float:
        """The number of epochs in `step` steps."""
        return step * self.config.train.batch_size / self.num_images

    def restart_clock(self) -> None:
        """Start timing steps now; the time before this moment does not count."""
        self._started, self._waited = time.perf_counter(), self.loader.wait_s

    def clock(self) -> tuple[float, float]:
        """Seconds since `restart_clock`, and how many of them steps waited for data."""
        return time.perf_counter() - self._started, self.loader.wait_s - self._waited
