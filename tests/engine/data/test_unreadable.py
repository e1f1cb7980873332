"""Images that cannot be read are named once, whichever process met them, and counted."""

from types import SimpleNamespace
from typing import Any

import pytest

from simmim.data import unreadable
from simmim.data.unreadable import MOST_NAMED, UnreadableImages
from simmim.distributed import World
from small_run import CPU

SOURCE: Any = SimpleNamespace(names=[f"{number}.jpg" for number in range(100)])


def test_an_image_is_new_once() -> None:
    images = UnreadableImages(SOURCE, World(0, 1, CPU), known=[3])
    for sample in (7, 3, 5, 7):
        images.note(sample, "cut off")
    assert images.agree() == [(5, "cut off"), (7, "cut off")]
    assert images.samples == {3, 5, 7}
    images.note(7, "cut off")
    assert images.agree() == []
    assert images.describe((5, "cut off")) == "5.jpg: cut off"


def test_what_other_processes_met_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(own: list[tuple[int, str]], world: World) -> list[list[tuple[int, str]]]:
        return [own, [(1, "empty"), (9, "empty")]]

    monkeypatch.setattr(unreadable, "gather_objects", gather)
    images = UnreadableImages(SOURCE, World(0, 2, CPU))
    images.note(4, "cut off")
    assert images.agree() == [(1, "empty"), (4, "cut off"), (9, "empty")]
    assert images.samples == {1, 4, 9}


@pytest.mark.parametrize("count", [1, MOST_NAMED, MOST_NAMED + 1])
def test_a_report_names_the_first_and_counts_the_rest(count: int) -> None:
    problems = [(sample, "empty") for sample in range(count)]
    lines: list[str] = []
    main = UnreadableImages(SOURCE, World(0, 1, CPU))
    main.report(problems, lines.append, "unreadable, left out", 100)
    assert lines[:1] == ["unreadable, left out: 0.jpg: empty"]
    assert len(lines) == min(count, MOST_NAMED) + (count > MOST_NAMED)
    if count > MOST_NAMED:
        assert lines[-1] == f"unreadable, left out: {count} of 100 images in all"
    other: list[str] = []
    UnreadableImages(SOURCE, World(1, 2, CPU)).report(problems, other.append, "unreadable", 100)
    assert other == []


def test_the_last_reason_of_an_image_counts_and_names_come_in_order() -> None:
    images = UnreadableImages(SOURCE, World(0, 1, CPU))
    for sample, reason in ((9, "cut off"), (2, "empty"), (9, "no disk")):
        images.note(sample, reason)
    assert images.agree() == [(2, "empty"), (9, "no disk")]


def test_lines_say_what_the_images_are() -> None:
    lines: list[str] = []
    images = UnreadableImages(SOURCE, World(0, 1, CPU))
    images.report([(8, "empty"), (3, "cut off")], lines.append, "not counted", 50)
    assert lines == ["not counted: 8.jpg: empty", "not counted: 3.jpg: cut off"]
