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
        os.kill(os.getpid(), number)  # launchers deliver the same signal twice
        assert asked.agreed(ALONE)
        assert asked.received is number
    assert signal.getsignal(number) is before


def test_a_later_interrupt_means_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += interrupts.SECOND_INTERRUPT_S + 0.1
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that repeats itself waits for the save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_while_waiting_stops_at_once_and_only_once() -> None:
    with Interrupts() as asked:
        asked.only_waiting = lambda: True
        with pytest.raises(StopWaiting):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # must not interrupt the cleanup
        assert asked.received is signal.SIGTERM
