"""What a run says about its data: waiting, and images that cannot be read."""

from types import SimpleNamespace
from typing import Any

from simmim.data.unreadable import MOST_NAMED, UnreadableImages
from simmim.distributed import World
from simmim.training.loop import WAIT_WARNING_INTERVAL, Loop
from small_run import CPU


class Log:
    """Collects warnings, and which of them a terminal would show."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shown: list[str] = []

    def warn(self, line: str, *, shown: bool = True) -> None:
        self.lines.append(line)
        if shown:
            self.shown.append(line)


def loop(**attributes: Any) -> Any:
    """The part of a loop that its warnings read."""
    state = SimpleNamespace(step=0)
    loader = SimpleNamespace(remedy=lambda: "do this", problems=[], source=None)
    settings = {"first_step": 0, "next_wait_warning": 0}
    own = {"state": state, "loader": loader, "log": Log()}
    return SimpleNamespace(**(own | settings | attributes))


def test_waiting_for_data_is_said_once_with_a_remedy() -> None:
    run = loop()
    heard = {}
    for step in range(10, 3 * WAIT_WARNING_INTERVAL, 10):
        run.state.step = step
        before = len(run.log.lines)
        Loop._warn_of_waiting(run, 0.05 if step in (20, 30) else 0.35, 10)
        if len(run.log.lines) > before:
            heard[step] = run.log.lines[-1]
    # not in the first window, nor below the limit, and then every thousand steps
    assert list(heard) == [40, 1040, 2040]
    assert set(heard.values()) == {"data-wait 35% of the time: do this"}


def test_many_unreadable_images_do_not_flood_the_terminal() -> None:
    names = [f"{number}.jpg" for number in range(100)]
    source: Any = SimpleNamespace(names=names)
    collector = UnreadableImages(source, World(0, 1, CPU))
    run = loop(run=SimpleNamespace(unreadable=collector))
    for _ in range(2):
        run.loader.problems = [(sample, "cut off") for sample in range(MOST_NAMED + 5)]
        Loop._note_unreadable(run)
    assert run.log.lines[:2] == ["unreadable: 0.jpg: cut off", "unreadable: 1.jpg: cut off"]
    assert len(run.log.lines) == MOST_NAMED + 5 + 1  # every image once, and the count
    assert run.log.shown[-1] == "unreadable: 5 more, all in log.txt"
    assert len(run.log.shown) == MOST_NAMED + 1
