"""What a training run is while it goes on: the loop drives it, observers are told of it."""

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
        loader: of its images.
        folder: claimed.
        log: progress and records.
        unreadable: images that could not be read so far.
        saved_step: of the newest checkpoint; -1 where there is none.

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
        """Of the run."""
        return self.state.config

    @property
    def world(self) -> World:
        """This process."""
        return self.state.world

    @property
    def step(self) -> int:
        """Optimiser steps that were made."""
        return self.state.step

    @property
    def model(self) -> ImageModel:
        """The weights that the run is for: averaged ones where it keeps an average."""
        return self.state.averaged or self.state.model

    @property
    def num_images(self) -> int:
        """Images of an epoch."""
        return len(self.loader.source.names)

    def epoch_of(self, step: int) -> float:
        """Epochs that `step` steps are."""
        return step * self.config.train.batch_size / self.num_images

    def restart_clock(self) -> None:
        """Time steps from now on: what came before was no step."""
        self._started, self._waited = time.perf_counter(), self.loader.wait_s

    def clock(self) -> tuple[float, float]:
        """Seconds since `restart_clock`, and those of them that steps waited for data."""
        return time.perf_counter() - self._started, self.loader.wait_s - self._waited
