"""Threads that read for DALI: errors reach the consumer, and none of them outlives a pass."""

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

import pytest

from dali_pipelines import (
    every,
    pipeline,
)
from simmim.data.dali import backend, readers
from simmim.data.open import open_source
from simmim.data.source import Source

needs_dali = pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())


class Slow:
    """A source that stops to answer after some reads, until `go_on` is set."""

    def __init__(self, source: Source, answers: int) -> None:
        self.source, self.names, self.left = source, source.names, answers
        self.go_on = threading.Event()

    def read(self, index: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            self.go_on.wait()
        return self.source.read(index)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before
    until = time.monotonic() + 120  # the kernel may show one that was joined a little longer
    while names := dalis_threads():
        assert time.monotonic() < until, names
        time.sleep(0.01)


def dalis_threads() -> list[str]:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text())
    return [name for name in names if "DALI" in name]


@needs_dali
@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_the_consumer_leaves_no_thread(jpegs: Path, error: type[BaseException]) -> None:
    source = open_source(str(jpegs))
    endless = chain.from_iterable([every(source)] * 100)

    def train() -> None:
        with closing(pipeline(source).batches(endless)) as made:
            for number, _ in enumerate(made):
                assert dalis_threads()
                if number == 3:
                    raise error

    with pytest.raises(error):
        train()


@needs_dali
@pytest.mark.usefixtures("no_thread_stays")
def test_an_error_of_the_machine_reaches_the_consumer(jpegs: Path) -> None:
    source = open_source(str(jpegs))

    class OutOfDescriptors:
        names = source.names

        def read(self, index: int) -> bytes:
            if index == 11:
                raise OSError(errno.EMFILE, "Too many open files")
            if index == 2:
                raise OSError(errno.EIO, "Input/output error")
            return source.read(index)

    made = pipeline(OutOfDescriptors()).batches(every(source))
    assert next(made).problems == [(2, "Input/output error")]
    with pytest.raises(OSError, match="Too many open files"):
        next(made)


@needs_dali
def test_a_read_that_hangs_does_not_hang_the_close(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CLOSE_S", 0.2)
    source = Slow(open_source(str(jpegs)), answers=16)
    made = pipeline(source).batches(every(source))
    next(made)
    hanging = [t for t in threading.enumerate() if t.name.startswith("simmim-read")]
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 300  # and not for ever
    source.go_on.set()
    for thread in hanging:
        assert thread.daemon
        thread.join(300)
        assert not thread.is_alive()


@needs_dali
@pytest.mark.usefixtures("no_thread_stays")
def test_a_read_that_hangs_is_given_up(jpegs: Path) -> None:
    source = Slow(open_source(str(jpegs)), answers=5)
    said: list[str] = []
    made = pipeline(source, threads=1, timeout_s=1.0, report=said.append).batches(every(source)[:1])
    filled = next(made)
    source.go_on.set()
    made.close()
    assert "no answer" in filled.problems[0][1]
    assert 1 <= len(said) == len(filled.problems)
    assert not filled.image[filled.problems[0][0]].any()
    assert filled.image[0].any()
