"""Signals are requests: remembered, agreed on, and raised only where nothing is half done."""

import os
import signal

import pytest

from simmim.distributed import World
from simmim.training import interrupts
from simmim.training.interrupts import Interrupts, StopWaiting
from small_run import CPU

ALONE = World(0, 1, CPU)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts() as asked:
        assert not asked.agreed(ALONE)
        os.kill(os.getpid(), number)
        try:
            os.kill(os.getpid(), number)  # launchers deliver the same signal twice
        except KeyboardInterrupt:
            pytest.fail("a repeat ends the run before it is saved")
        assert asked.agreed(ALONE)
        assert asked.received is number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("own", "others", "stops"),
    [(False, 0, False), (True, 0, True), (False, 1, True), (True, 3, True)],
)
def test_processes_stop_together_if_any_was_asked(
    monkeypatch: pytest.MonkeyPatch, own: bool, others: int, stops: bool
) -> None:
    """A scheduler may send its signal to one of them alone; `test_distributed` has two."""
    monkeypatch.setattr(interrupts, "all_reduce_sum", lambda flag, world: flag + others)
    asked = Interrupts()
    asked.received = signal.SIGTERM if own else None
    assert asked.agreed(World(0, 4, CPU)) == stops


def test_a_process_alone_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "all_reduce_sum", None)
    assert not Interrupts().agreed(ALONE)


def test_a_later_interrupt_means_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += interrupts.SECOND_INTERRUPT_S
        os.kill(os.getpid(), signal.SIGINT)  # one key press may arrive as two signals
        clock[0] += 0.1
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that repeats itself waits for the save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_while_waiting_stops_at_once_and_only_once() -> None:
    with Interrupts() as asked:
        assert not asked.only_waiting()
        asked.only_waiting = lambda: True
        with pytest.raises(StopWaiting):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # must not interrupt the cleanup
        assert asked.received is signal.SIGTERM
