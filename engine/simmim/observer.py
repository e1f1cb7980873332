"""What a training run does between its steps, beside logging and saving."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from simmim.loop import Loop


class Observer:
    """Is told of the steps of a run: draws pictures, evaluates, watches over it.

    Attributes:
        busy: whether it does something right now that a signal may cut short; only where one
            process runs.
    """

    busy: bool = False

    def begin(self, loop: "Loop") -> None:
        """Called in every process before the first step of this start."""

    def observe(self, loop: "Loop", *, last: bool, stopping: bool) -> None:
        """Called after every step in every process, once its checkpoint, if due, is saved.

        Args:
            loop: the run.
            last: whether the run is complete.
            stopping: whether the run is asked to stop now.
        """

    def measures(self, loop: "Loop") -> dict[str, Tensor]:
        """Scalars of the last step for metrics.jsonl, beside the engine's own."""
        return {}

    def measured(self, loop: "Loop", values: dict[str, float]) -> None:
        """Called in every process with the values of `measures`, where a progress line is due."""

    def finish(self, loop: "Loop") -> None:
        """Called in every process when the run is complete and its weights are written."""


class Observers(Observer):
    """Several observers as one, asked in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    @property
    def busy(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(observer.busy for observer in self.observers)

    def begin(self, loop: "Loop") -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.begin(loop)

    def observe(self, loop: "Loop", *, last: bool, stopping: bool) -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.observe(loop, last=last, stopping=stopping)

    def measures(self, loop: "Loop") -> dict[str, Tensor]:
        """See `Observer`."""
        return {
            name: value
            for observer in self.observers
            for name, value in observer.measures(loop).items()
        }

    def measured(self, loop: "Loop", values: dict[str, float]) -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.measured(loop, values)

    def finish(self, loop: "Loop") -> None:
        """See `Observer`."""
        for observer in self.observers:
            observer.finish(loop)
