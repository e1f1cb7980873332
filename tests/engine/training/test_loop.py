"""The loop of a run: when it logs, saves, stops and gives up, and what it says about its data.

Its step is a stand-in that computes nothing, so that a run of many steps takes no time.
"""

import gc
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simmim.data.unreadable import MOST_NAMED, UnreadableImages
from simmim.distributed import World
from simmim.errors import DataError
from simmim.training import checkpoint, graphed_steps, loop
from simmim.training.interrupts import StopWaiting
from simmim.training.loop import WAIT_WARNING_INTERVAL, Loop, RunStopped, train
from small_loop import ALONE, NAMES, Signals, Small
from small_run import CPU, make_state

Make = Callable[..., Small]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """make(*flags): a small run in a folder."""
    made: list[Small] = []

    def build(*flags: str) -> Small:
        made.append(Small(tmp_path, *flags))
        monkeypatch.setattr(graphed_steps, "train_step", made[-1].step)
        return made[-1]

    yield build
    for small in made:
        small.log.close()


def test_a_row_for_every_step_and_a_line_as_often_as_configured(make: Make) -> None:
    small = make("--train.steps=7", "--log.every_steps=3")
    assert small.drive() == 0
    rows = small.rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in rows] == [step / 4 for step in range(1, 8)]
    assert [row["grad_norm"] for row in rows] == [step / 2 for step in range(1, 8)]
    assert [row["lr"] for row in rows] == [step / 8 for step in range(1, 8)]
    assert [row["epoch"] for row in rows] == [step * 8 / 20 for step in range(1, 8)]
    lines = [line.split()[1] for line in small.told if line.startswith("step ")]
    assert lines == ["3/7", "6/7", "7/7"]
    # what is measured belongs to the last step of each line
    measured = [(row["step"], row["measure"]) for row in rows if "measure" in row]
    assert measured == [(3, 3.0), (6, 6.0), (7, 7.0)]
    assert small.watching.heard == [(step, {"measure": float(step)}) for step in (3, 6, 7)]


def test_rates_are_those_of_all_steps_since_the_last_line(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make("--train.steps=8", "--log.every_steps=4")
    monkeypatch.setattr(small.run, "clock", lambda: (2.0, 0.5))
    small.drive()
    first, last = small.rows[3], small.rows[7]
    assert (first["images_per_s"], first["data_wait"], first["eta_s"]) == (16.0, 0.25, 2.0)
    assert last["eta_s"] == 0.0
    assert first["skipped"] == first["unreadable"] == 0
    assert first["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--checkpoint.every_steps=2", "--checkpoint.keep_last=9"], [2, 4, 6, 8, 9]),
        (["--checkpoint.every_steps=2", "--checkpoint.keep_last=2"], [8, 9]),
        (["--checkpoint.every_steps=2", "--checkpoint.keep_last=1",
          "--checkpoint.keep_every_steps=4"], [4, 8, 9]),
        (["--checkpoint.every_steps=0"], [9]),
    ],
)  # fmt: skip
def test_checkpoints_are_saved_and_kept_as_configured(
    make: Make, flags: list[str], kept: list[int]
) -> None:
    small = make("--train.steps=9", *flags)
    small.drive()
    assert small.kept == kept


def test_without_an_interval_an_epoch_is_saved_unless_it_is_short(make: Make) -> None:
    small = make("--checkpoint.every_steps=0")
    source: Any = SimpleNamespace(names=["x"] * 960)
    for images, every in ((960, 120), (80, 100)):  # 120 and 10 steps of 8 images
        source.names = ["x"] * images
        small.loader.source = source
        due = [step for step in range(1, 301) if saved_at(small, step)]
        assert due == list(range(every, 301, every))


def saved_at(small: Small, step: int) -> bool:
    small.state.step = step
    return small.loop._checkpoint_due()


def test_observers_are_told_after_the_checkpoint(make: Make) -> None:
    small = make("--train.steps=3", "--checkpoint.every_steps=2")
    small.drive()
    assert small.watching.calls == [
        (1, -1, False, False),
        (2, 2, False, False),
        (3, 3, True, False),
    ]
    assert small.watching.finished == [True]  # with the weights in their place


def test_a_checkpoint_holds_what_resuming_compares(make: Make) -> None:
    small = make("--train.steps=2")
    small.loader.problems = [(7, "cut off"), (3, "empty")]
    small.drive()
    state = checkpoint.read(small.folder.checkpoints / "step_00000002").state
    assert state["data"] == {"images": 20, "digest": "d"}
    assert state["unreadable"] == [3, 7]
    assert state["config"]["train"]["batch_size"] == 8


def test_weights_that_lead_only_to_bad_steps_push_out_no_good_checkpoint(make: Make) -> None:
    flags = ["--checkpoint.every_steps=2", "--checkpoint.keep_last=1", "--train.max_bad_steps=9"]
    small = make("--train.steps=7", *flags)
    small.bad = {5, 6, 7}
    small.drive()
    # the checkpoint of step 4 is the last with weights that a good step led to
    assert small.kept == [4, 6, 7]
    # a good step afterwards shows that the weights are well, and the older ones may go
    small = make("--train.steps=8", *flags)
    small.bad = {5, 6}
    small.drive()
    assert small.kept == [8]


def test_too_many_bad_steps_in_a_row_end_the_run(make: Make) -> None:
    small = make("--train.steps=20", "--train.max_bad_steps=3", "--checkpoint.every_steps=2")
    small.bad = {3, 4, 7, 8, 9, 10}
    with pytest.raises(RunStopped, match=r"step 9: 3 steps in a row .* the checkpoint of step 8 "):
        small.drive()
    assert [row["step"] for row in small.rows] == list(range(1, 10))  # the bad ones included
    assert [row["step"] for row in small.rows if row["loss"] is None] == [3, 4, 7, 8, 9]
    assert small.rows[-1]["skipped"] == 5
    assert "warning: non-finite loss or gradient, update skipped: step 3, 4" in small.told
    assert not small.folder.weights.exists()
    assert small.loader.closed


def test_bad_steps_before_the_first_checkpoint(make: Make) -> None:
    small = make("--train.steps=20", "--train.max_bad_steps=1")
    small.bad = {1}
    with pytest.raises(RunStopped, match=r"step 1: 1 steps .* nothing was saved yet"):
        small.drive()


def test_a_device_is_asked_only_now_and_then(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad steps and signals of other processes wait for the tenth step, or the next line."""
    flags = ["--train.steps=40", "--train.max_bad_steps=1", "--checkpoint.every_steps=100"]
    small = make(*flags, "--log.every_steps=15")
    small.bad, small.loop.world = {12}, World(0, 2, torch.device("cuda", 0))
    monkeypatch.setattr(loop, "_peak_memory", lambda world: 0)
    signals = Signals()
    with pytest.raises(RunStopped, match="step 15: "):
        small.drive(signals)
    assert len(signals.worlds) == 1  # after step 10
    alone = make(*flags, "--log.every_steps=100")
    alone.bad, alone.loop.world = {12}, World(0, 1, torch.device("cuda", 0))
    signals = Signals()
    with pytest.raises(RunStopped, match="step 20: "):
        alone.drive(signals)
    assert len(signals.worlds) == 19  # asking oneself costs nothing


@pytest.mark.parametrize(
    ("received", "name"),
    [(signal.SIGINT, "SIGINT"), (None, "a signal to another process")],
)
def test_a_run_that_is_asked_to_stop_saves_and_says_so(
    make: Make, received: signal.Signals | None, name: str
) -> None:
    """Also where another process was asked: what counts is what all agreed on."""
    small = make("--train.steps=9", "--log.every_steps=100")
    signals = Signals(3, received)
    assert small.drive(signals) == 75
    assert small.kept == [3]
    assert [row["step"] for row in small.rows] == [1, 2, 3]
    assert small.told[-1] == f"stopped by {name}: saved at step 3; the same command resumes"
    assert small.watching.calls[-1] == (3, 3, False, True)
    assert small.watching.finished == []
    assert set(signals.worlds) == {ALONE}
    assert small.loader.closed


def test_a_signal_that_is_not_agreed_on_stops_nothing(make: Make) -> None:
    small = make("--train.steps=4")
    assert small.drive(Signals(-1, signal.SIGTERM)) == 0
    assert small.state.step == 4


def test_a_signal_in_the_last_step_does_not_stop_a_complete_run(make: Make) -> None:
    small = make("--train.steps=4")
    assert small.drive(Signals(4, signal.SIGTERM)) == 0
    assert small.folder.weights.exists()
    assert small.told[-1] == f"done: 4 steps; weights in {small.folder.weights}"


def test_a_signal_while_data_is_awaited_saves_the_steps_made(make: Make) -> None:
    small = make("--train.steps=9")
    signals = Signals(-1, signal.SIGTERM)

    def hang(step: int) -> None:
        if step == 5:
            assert signals.only_waiting is not None
            assert not signals.only_waiting()
            small.loader.waiting = True
            assert signals.only_waiting()
            small.loader.waiting, small.watching.busy = False, True
            assert signals.only_waiting()
            raise StopWaiting

    small.loader.fails = hang
    assert small.drive(signals) == 75
    assert small.kept == [5]
    assert "saved at step 5" in small.told[-1]


def test_several_processes_are_never_interrupted_while_they_wait(make: Make) -> None:
    small = make("--train.steps=2")
    small.loop.world = World(0, 2, CPU)
    signals = Signals()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.distributed, "broadcast_object", lambda value, world: value)
        small.drive(signals)
    assert signals.only_waiting is None


def gone(at: int) -> Callable[[int], None]:
    def fail(step: int) -> None:
        if step == at:
            raise DataError("photos: is the disk still there?")

    return fail


def test_data_that_fails_later_costs_no_step(make: Make) -> None:
    small = make("--train.steps=9")
    small.loader.fails = gone(5)
    with pytest.raises(RunStopped, match="is the disk still there"):
        small.drive()
    assert small.kept == [5]
    assert [row["step"] for row in small.rows] == [1, 2, 3, 4, 5]


def test_data_that_fails_at_once_is_an_error_of_the_data(make: Make) -> None:
    small = make("--train.steps=9")
    small.loader.fails = gone(0)
    with pytest.raises(DataError) as caught:
        small.drive()
    assert not isinstance(caught.value, RunStopped)
    assert small.kept == []


def test_several_processes_do_not_save_without_the_others(make: Make) -> None:
    small = make("--train.steps=9", "--log.every_steps=1")
    small.loop.world, small.loader.fails = World(0, 2, CPU), gone(5)
    with pytest.raises(RunStopped):
        small.drive()
    assert small.kept == []


def test_a_checkpoint_that_another_process_could_not_write_ends_this_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make("--train.steps=2")
    small.loop.world = World(1, 2, CPU)
    monkeypatch.setattr(loop.distributed, "broadcast_object", lambda value, world: "no space")
    with pytest.raises(checkpoint.CheckpointError, match="no space"):
        small.drive()
    assert small.kept == []  # only the main process writes


def test_a_checkpoint_that_cannot_be_written_ends_the_run(make: Make) -> None:
    small = make("--train.steps=2")
    small.folder.checkpoints.write_text("a file in the way")
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints"):
        small.drive()
    assert gc.get_freeze_count() == 0


def test_what_is_built_before_the_first_step_is_not_collected(make: Make) -> None:
    small, counts = make("--train.steps=2"), list[int]()
    small.loader.fails = lambda step: counts.append(gc.get_freeze_count())
    small.drive()
    assert min(counts) > 1000
    assert gc.get_freeze_count() == 0


def test_the_final_weights_are_the_averaged_ones(make: Make) -> None:
    small = make("--train.steps=1")
    for value, expected in ((None, 0.5), (0.25, 0.25)):
        for parameter in small.state.model.parameters():
            parameter.data.fill_(0.5)
        if value is not None:
            small.state.averaged = make_state().model
            for parameter in small.state.averaged.parameters():
                parameter.data.fill_(value)
        path = small.folder.root / "weights.safetensors"
        loop.write_weights(small.state, path)
        tensors = load_file(path)
        assert all(
            torch.all(tensors[n] == expected) for n, _ in small.state.model.named_parameters()
        )


def begin(small: Small) -> tuple[int, Small]:
    """`train` in the place of `drive`: it resumes first."""
    source: Any = SimpleNamespace(names=Names(NAMES))
    observer, signals = small.watching, Signals()
    made: Any = lambda: small.loader  # noqa: E731
    given: Any = signals
    with closing(small.log):
        code = train(small.state, source, made, lambda _: observer, small.folder, small.log, given)
    return code, small


class Names(list[str]):
    def digest(self) -> str:
        return "d"


def test_a_run_goes_on_where_it_was_saved(make: Make) -> None:
    code, first = begin(make("--train.steps=4"))
    assert (code, first.loader.asked) == (0, (0, 4))
    assert first.watching.calls[0] == (1, -1, False, False)
    before = first.folder.weights.stat().st_mtime_ns
    code, done = begin(make("--train.steps=4"))
    assert (code, done.loader.asked) == (0, (-1, -1))
    assert "already done: 4 steps" in done.told[-1]
    assert first.folder.weights.stat().st_mtime_ns == before
    code, longer = begin(make("--train.steps=6"))
    assert (code, longer.loader.asked) == (0, (4, 6))
    assert longer.watching.calls[0] == (5, 4, False, False)  # the newest checkpoint is of step 4
    assert longer.kept == [4, 6]
    assert [row["step"] for row in longer.rows] == [1, 2, 3, 4, 5, 6]
    starts = json.loads(first.folder.starts.read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4]


def test_a_complete_run_without_its_weights_writes_them(make: Make) -> None:
    """A run that was killed between its last checkpoint and its weights."""
    _, first = begin(make("--train.steps=4"))
    first.folder.weights.unlink()
    code, _ = begin(make("--train.steps=4"))
    assert code == 0
    assert first.folder.weights.exists()


class Log:
    """Collects warnings, and which of them a terminal would show."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shown: list[str] = []

    def warn(self, line: str, *, shown: bool = True) -> None:
        self.lines.append(line)
        if shown:
            self.shown.append(line)


def part(**attributes: Any) -> Any:
    """The part of a loop that its warnings read."""
    state = SimpleNamespace(step=0)
    loader = SimpleNamespace(remedy=lambda: "do this", problems=[], source=None)
    settings = {"first_step": 0, "next_wait_warning": 0}
    own = {"state": state, "loader": loader, "log": Log()}
    return SimpleNamespace(**(own | settings | attributes))


def test_waiting_for_data_is_said_once_with_a_remedy() -> None:
    run = part()
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
    run = part(run=SimpleNamespace(unreadable=collector))
    for _ in range(2):
        run.loader.problems = [(sample, "cut off") for sample in range(MOST_NAMED + 5)]
        Loop._note_unreadable(run)
    assert run.log.lines[:2] == ["unreadable: 0.jpg: cut off", "unreadable: 1.jpg: cut off"]
    assert len(run.log.lines) == MOST_NAMED + 5 + 1  # every image once, and the count
    assert run.log.shown[-1] == "unreadable: 5 more, all in log.txt"
    assert len(run.log.shown) == MOST_NAMED + 1
