"""Turns SIGTERM and SIGINT into a request to save and stop between two steps."""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import torch

from simmim.distributed import World, all_reduce_sum

# "Temporary failure, try again" of sysexits.h. It tells a scheduler to requeue the job, unlike a
# crash (1) or a wrong command line (2).
EXIT_INTERRUPTED = 75

# A Ctrl-C that comes later than this after the first signal stops the run at once.
SECOND_INTERRUPT_S = 2.0

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopWaiting(BaseException):
    """A signal came while the process only waited: nothing is half done.

    Like KeyboardInterrupt, it is not an `Exception`: it may be raised while an image is decoded,
    and there every `Exception` means that the image cannot be read.
    """


class Interrupts:
    """Remembers signals while active; only a second, later Ctrl-C raises KeyboardInterrupt.

    Schedulers and launchers often deliver the same SIGTERM twice: a repeat must not prevent the
    save.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        # says whether raising StopWaiting is safe at the moment
        self.only_waiting: Callable[[], bool] = lambda: False

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.only_waiting():
            self.received, self._since = signal.Signals(number), time.monotonic()
            self.only_waiting = lambda: False  # a repeat must not interrupt the cleanup
            raise StopWaiting
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SECOND_INTERRUPT_S:
            raise KeyboardInterrupt

    def agreed(self, world: World) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        asked = self.received is not None
        if world.size == 1:
            return asked
        flag = torch.tensor(float(asked), device=world.device)
        return bool(all_reduce_sum(flag, world).item() > 0)
