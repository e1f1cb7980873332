"""A run whose loader, signals and step are stand-ins: it takes no time, and all is known."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simmim.data.unreadable import UnreadableImages
from simmim.distributed import World
from simmim.run_folder import RunFolder
from simmim.training import checkpoint
from simmim.training.log import RunLog
from simmim.training.loop import Loop
from simmim.training.observer import Observer
from simmim.training.run import Run
from simmim.training.step import Metrics, TrainState
from small_run import CPU, make_state

ALONE = World(0, 1, CPU)
NAMES = [f"{number}.jpg" for number in range(20)]


class Loader:
    """Loads nothing; `fails` may raise before a step."""

    def __init__(self) -> None:
        self.source, self.wait_s, self.waiting = SimpleNamespace(names=NAMES), 0.0, False
        self.problems: list[tuple[int, str]] = []
        self.fails: Callable[[int], None] = lambda step: None
        self.backend, self.asked, self.closed = "cpu", (-1, -1), False

    def steps(self, first: int, last: int) -> Iterator[list[Any]]:
        self.asked = (first, last)
        try:
            for step in range(first, last):
                self.fails(step)
                yield []
        finally:
            self.closed = True

    def remedy(self) -> str:
        return "do this"


class Signals:
    """Answers that the run is asked to stop after step `at`."""

    def __init__(self, at: int = -1, received: signal.Signals | None = None) -> None:
        self.at, self.received, self.worlds = at, received, list[World]()
        self.only_waiting: Callable[[], bool] | None = None

    def agreed(self, world: World) -> bool:
        self.worlds.append(world)
        return len(self.worlds) == self.at


class Watching(Observer):
    """Remembers when it was called, and measures the number of the step."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool, bool]] = []
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.finished: list[bool] = []

    def observe(self, run: Run, *, last: bool, stopping: bool) -> None:
        self.calls.append((run.step, run.saved_step, last, stopping))

    def measures(self, run: Run) -> dict[str, Tensor]:
        return {"measure": torch.tensor(float(run.step))}

    def measured(self, run: Run, values: dict[str, float]) -> None:
        self.heard.append((run.step, values))

    def finish(self, run: Run) -> None:
        self.finished.append(run.folder.weights.exists())


class Small:
    """A run of steps that compute nothing.

    Attributes:
        bad: steps (1, 2, …) whose gradients are not finite.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.state = make_state("--train.batch_size=8", *flags)
        self.folder, self.loader = RunFolder(folder), Loader()
        total = self.state.schedule.total_steps
        self.log = RunLog(self.folder, total, is_main=True, tensorboard=False)
        self.bad: set[int] = set()
        source: Any = self.loader.source
        given: Any = self.loader
        unreadable = UnreadableImages(source, ALONE)
        self.run = Run(self.state, given, self.folder, self.log, unreadable, -1)
        self.watching = Watching()
        self.loop = Loop(self.run, self.watching, {"images": 20, "digest": "d"})

    def step(self, state: TrainState, batches: Any) -> Metrics:
        """In the place of `train_step`."""
        state.step += 1
        bad = state.step in self.bad
        state.bad_in_a_row = (state.bad_in_a_row + 1) * float(bad)
        state.longest_bad_run = torch.maximum(state.longest_bad_run, state.bad_in_a_row)
        state.skipped = state.skipped + float(bad)
        loss = torch.tensor(float("nan") if bad else state.step / 4)
        return Metrics(loss, torch.tensor(state.step / 2), torch.tensor(not bad), state.step / 8)

    def drive(self, signals: Signals | None = None) -> int:
        given: Any = signals or Signals()
        with closing(self.log):
            return self.loop.drive(given)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]

    @property
    def told(self) -> list[str]:
        """The lines of log.txt, without their times."""
        return [line[20:] for line in self.folder.log.read_text().splitlines()]

    @property
    def kept(self) -> list[int]:
        return list(checkpoint.steps(self.folder.checkpoints))
