"""What a pre-training run does between its steps: pictures, and the measures of its method."""

from pathlib import Path

from torch import Tensor

from simmim.method.method import Method
from simmim.training.observer import Draw, Observer, draw_picture
from simmim.training.run import Run

# Steps between two warnings of the method.
WARNING_INTERVAL = 1000


class Pictures(Observer):
    """Draws a picture with every checkpoint, or as `log.picture_every_steps` says.

    Args:
        draw: draws the model in its present state; only the main process draws.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def observe(self, run: Run, *, last: bool, stopping: bool) -> None:
        """Draw if a picture is due."""
        if run.world.is_main and self._is_due(run, last):
            draw_picture(run, self.draw, run.state.model, run.folder.pictures, "reconstruction")
            run.restart_clock()

    def _is_due(self, run: Run, last: bool) -> bool:
        every = run.config.log.picture_every_steps
        if every < 0:
            return False
        if every == 0:
            return run.step == run.saved_step
        return last or run.step % every == 0

    def finish(self, run: Run) -> None:
        """Say where the pictures are."""
        say_where(run, "pictures", run.folder.pictures)


class MethodMeasures(Observer):
    """Records what the method measures, and logs its warning once in WARNING_INTERVAL steps.

    Args:
        method: the run's method.
    """

    def __init__(self, method: Method) -> None:
        self.method, self.next_warning = method, 0

    def measures(self, run: Run) -> dict[str, Tensor]:
        """See `Method.measures`."""
        return self.method.measures(run.state.model)

    def measured(self, run: Run, values: dict[str, float]) -> None:
        """Log the method's warning, if there is one."""
        if run.step >= self.next_warning and (warning := self.method.warning(values)):
            self.next_warning = run.step + WARNING_INTERVAL
            if run.world.is_main:
                run.log.warn(f"step {run.step}: {warning}")


def say_where(run: Run, what: str, folder: Path) -> None:
    """Say in the log where the pictures of a run are, if there are any."""
    if run.world.is_main and folder.is_dir():
        run.log.info(f"{what} in {folder}")
