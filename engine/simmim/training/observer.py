"""What a training run does between its steps, in addition to logging and saving."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from simmim.distributed import World, broadcast_object
from simmim.errors import RunError
from simmim.model.image_model import ImageModel
from simmim.pictures.grid import save_picture
from simmim.training import precision
from simmim.training.run import Run

# Draws a model in its present state; returns None if there is nothing to draw.
Draw = Callable[[ImageModel], Image.Image | None]


class Observer:
    """Is called between the steps of a run, to draw pictures, evaluate the model or watch over it.

    Attributes:
        busy: whether it is doing work that a signal may interrupt; True only in a run of one
            process.
    """

    busy: bool = False

    def begin(self, run: Run) -> None:
        """Called in every process before the first step of this start."""

    def observe(self, run: Run, *, last: bool, stopping: bool) -> None:
        """Called in every process after every step, and after its checkpoint if one is due.

        Args:
            run: the run after the step.
            last: whether the run is complete.
            stopping: whether the run is asked to stop now.
        """

    def measures(self, run: Run) -> dict[str, Tensor]:
        """Scalars of the last step that metrics record in addition to the engine's own."""
        return {}

    def measured(self, run: Run, values: dict[str, float]) -> None:
        """Called in every process with the values of `measures`, when a progress line is due."""

    def finish(self, run: Run) -> None:
        """Called in every process when the run is complete and its weights are written."""


class Observers(Observer):
    """Several observers as one; they are called in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    @property
    def busy(self) -> bool:  # type: ignore[override]
        """Whether one of the observers is busy."""
        return any(observer.busy for observer in self.observers)

    def begin(self, run: Run) -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.begin(run)

    def observe(self, run: Run, *, last: bool, stopping: bool) -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.observe(run, last=last, stopping=stopping)

    def measures(self, run: Run) -> dict[str, Tensor]:
        """See `Observer`."""
        return {
            name: value
            for observer in self.observers
            for name, value in observer.measures(run).items()
        }

    def measured(self, run: Run, values: dict[str, float]) -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.measured(run, values)

    def finish(self, run: Run) -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.finish(run)


class PeriodicObserver(Observer, ABC):
    """Measures the model every `every_epochs` epochs and at the end of the run.

    Each measurement is a row of a file. If a stop prevents a measurement, it is made when the run
    resumes.

    Args:
        every_epochs: epochs between two measurements.
        world: this process.

    Attributes:
        rows: the rows of the file so far; empty in all processes but the main one.
    """

    def __init__(self, every_epochs: float, world: World) -> None:
        self.every_epochs, self.world = every_epochs, world
        self.rows: list[dict[str, Any]] = []

    @abstractmethod
    def records(self, run: Run) -> Path:
        """The file of rows, one of `RunFolder.records`."""

    @abstractmethod
    def measure(self, run: Run) -> Any:
        """Measure `run.model` in every process; the result is the same in each."""

    @abstractmethod
    def row(self, measurement: Any) -> dict[str, Any]:
        """The values of a measurement that its row holds, in addition to step and epoch."""

    def keep(self, run: Run, measurement: Any, row: dict[str, Any]) -> None:
        """Write the files that belong to `row`, before it is recorded, in the main process.

        `rows` then holds the earlier rows.

        Raises:
            OSError: something could not be written.
            RunError: the same.
        """

    @abstractmethod
    def tell(self, run: Run, measurement: Any, row: dict[str, Any]) -> None:
        """Report a measurement in the main process, after its row is written."""

    def begin(self, run: Run) -> None:
        """Read the earlier rows; make the measurement that a stop prevented."""
        self.rows = run.log.recorded(self.records(run))
        done = any(row["step"] == run.step for row in self.rows)
        done = bool(broadcast_object(done, self.world))
        if run.step > 0 and not done and self._is_due(run, last=run.step == run.total):
            self._measure(run)

    def observe(self, run: Run, *, last: bool, stopping: bool) -> None:
        """Measure if it is due; a run that is asked to stop measures when it resumes."""
        if not stopping and self._is_due(run, last):
            self._measure(run)
            run.restart_clock()

    def _is_due(self, run: Run, last: bool) -> bool:
        batch, images = run.config.train.batch_size, run.num_images * self.every_epochs
        return last or int(run.step * batch / images) > int((run.step - 1) * batch / images)

    def _measure(self, run: Run) -> None:
        self.busy = self.world.size == 1
        try:
            measurement = self.measure(run)
        finally:
            self.busy = False
        problem: object = self._record(run, measurement) if self.world.is_main else None
        problem = broadcast_object(problem, self.world)
        if problem:
            raise RunError(str(problem))

    def _record(self, run: Run, measurement: Any) -> str | None:
        row = {"step": run.step, "epoch": run.epoch_of(run.step), **self.row(measurement)}
        try:
            self.keep(run, measurement, row)
            run.log.record(self.records(run), row)
        except OSError as error:
            return f"{error.filename or self.records(run)}: {error.strerror}"
        except RunError as error:
            return str(error)
        self.rows.append(row)
        self.tell(run, measurement, row)
        return None


def draw_picture(run: Run, draw: Draw, model: ImageModel, folder: Path, name: str) -> None:
    """Draw a picture of the model into `folder`, and pass it to TensorBoard as `name`.

    If it cannot be written, the log warns: no run ends because of a picture.
    """
    with precision.autocast(run.world.device, run.config.train.precision):
        picture = draw(model)
    if picture is None:
        return
    path = folder / f"step_{run.step:08d}.png"
    try:
        save_picture(picture, path)
    except OSError as error:
        run.log.warn(f"{path}: could not be written: {error.strerror}")
    run.log.picture(np.asarray(picture), run.step, name)
