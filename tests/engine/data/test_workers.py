"""The processes of the data path: killed, hung, crashing; every sample comes once, and the same."""

import errno
import faulthandler
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simmim.data import workers as data_workers
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.producer import InlineProducer
from simmim.data.task_table import TaskTable
from simmim.data.workers import WorkerPool
from simmim.errors import DataError

SAMPLES = 40


class Numbers:
    """Samples whose array says which sample it is; `before` may misbehave."""

    shape: tuple[int, ...] = (3, 5)
    dtype = "int32"

    def __init__(self, before: Callable[[int, int], object] = lambda epoch, sample: None) -> None:
        self.before = before

    def fill(self, out: NDArray[Any], epoch: int, sample: int) -> str:
        self.before(epoch, sample)
        if sample % 10 == 7:
            out[...] = 0
            return f"no {sample}"
        out[...] = 1000 * epoch + sample
        return ""

    def name(self, sample: int) -> str:
        return f"number {sample}"


def places(micro_batch: int = 8, steps: int = 20) -> list[list[tuple[int, int]]]:
    return list(MicroBatches(SampleOrder(SAMPLES, 3), micro_batch, 1, 0, 1, 0, steps))


def contents(batches: Any) -> list[tuple[list[int], list[tuple[int, str]]]]:
    found = []
    for filled in batches:
        array = filled.image.numpy()
        assert (array == array[:, :1, :1]).all()
        found.append((array[:, 0, 0].tolist(), filled.problems))
    return found


def pool(samples: Numbers, reports: list[str] | None = None, **options: Any) -> WorkerPool:
    settings: dict[str, Any] = {"workers": 2, "prefetch": 3, "timeout_s": 60} | options
    report = [].append if reports is None else reports.append
    return WorkerPool(samples, 8, report=report, **settings)


EXPECTED = contents(InlineProducer(Numbers()).batches(places()))


@pytest.fixture(autouse=True)
def _nothing_stays() -> Any:
    before = len(os.listdir("/proc/self/fd"))
    yield
    for child in multiprocessing.active_children():
        child.join(60)  # a busy machine takes its time to end what was killed
    assert not multiprocessing.active_children()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3), (5, 2), (3, 30)])
def test_any_crew_makes_the_same(workers: int, prefetch: int) -> None:
    made = pool(Numbers(), workers=workers, prefetch=prefetch).batches(places())
    assert contents(made) == EXPECTED


def test_batches_of_any_size() -> None:
    odd = [part[: 1 + number % 8] for number, part in enumerate(places())]
    expected = contents(InlineProducer(Numbers()).batches(odd))
    assert contents(pool(Numbers()).batches(odd)) == expected


def test_killed_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is killed after every batch; nothing is lost, doubled or late."""
    # chance may kill two at the same sample, which would be given up
    monkeypatch.setattr(data_workers, "LIVES_PER_SAMPLE", 1000)
    reports: list[str] = []
    slow = Numbers(lambda epoch, sample: time.sleep(0.001))
    generator = pool(slow, reports, workers=3).batches(places())
    found = []
    for number, filled in enumerate(generator):
        found.append((filled.image.numpy()[:, 0, 0].tolist(), filled.problems))
        children = multiprocessing.active_children()
        victim = children[number % len(children)]
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        time.sleep(0.002 * (number % 5))
    assert found == EXPECTED
    # the last three batches may be ready at the same look at the processes, which is the last
    assert 20 - 3 <= len(reports) < 20
    assert all("a data worker was killed by SIGKILL" in line for line in reports)


def once(folder: Path, name: str) -> bool:
    """Whether this is the first call anywhere, in any process."""
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def test_a_sample_that_kills_once_comes_all_the_same(tmp_path: Path) -> None:
    def die(epoch: int, sample: int) -> None:
        if sample == 12 and once(tmp_path, f"died-{epoch}"):
            os._exit(3)

    reports: list[str] = []
    assert contents(pool(Numbers(die), reports).batches(places())) == EXPECTED
    assert reports == ["a data worker ended with exit code 3 at number 12; replaced"] * 4


def test_a_sample_that_kills_always_is_given_up() -> None:
    def crash(epoch: int, sample: int) -> None:
        if sample == 12:
            faulthandler.disable()  # pytest's would print
            os.kill(os.getpid(), signal.SIGSEGV)

    reports: list[str] = []
    found = contents(pool(Numbers(crash), reports).batches(places()))
    reason = "a data worker was killed by SIGSEGV at it, 2 times"
    expected = []
    for (numbers, problems), batch in zip(EXPECTED, places()):
        lost = [(slot, reason) for slot, (_, sample) in enumerate(batch) if sample == 12]
        left = [0 if sample == 12 else n for n, (_, sample) in zip(numbers, batch)]
        expected.append((left, sorted(problems + lost)))
    assert found == expected
    assert len(reports) == 2 * 4  # twice in each of four epochs


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called in a worker: it hangs, and its sample looks begun 1000 s ago.

    So no timeout is needed that a sample could exceed because the machine is busy.
    """
    tables: list[Any] = []

    class Noted(TaskTable):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            tables[:] = [self]

    def hang() -> None:
        worker = int(multiprocessing.current_process().name.removeprefix("simmim-data-"))
        tables[0].since[worker] -= 1000
        time.sleep(1000)

    monkeypatch.setattr(data_workers, "TaskTable", Noted)
    monkeypatch.setattr(data_workers, "LOOK_INTERVAL_S", 0.2)
    return hang


def test_a_sample_that_hangs(tmp_path: Path, hang: Callable[[], None]) -> None:
    """Once: it is made by another process. Always: it is given up."""

    def begin(epoch: int, sample: int) -> None:
        if (sample == 5 and once(tmp_path, f"hung-{epoch}")) or (sample == 9 and epoch == 0):
            hang()

    reports: list[str] = []
    of_epoch_0 = places(steps=5)
    found = contents(pool(Numbers(begin), reports, timeout_s=900).batches(of_epoch_0))
    lost = [problem for _, problems in found for problem in problems if "answer" in problem[1]]
    (said,) = [reason for _, reason in lost]
    assert re.fullmatch(r"a data worker gave no answer for 1\d\d\d s at it, 2 times", said)
    good = [number for numbers, _ in found for number in numbers]
    assert good.count(5) == 1
    assert 9 not in good
    assert sorted(line.split(" at ")[1] for line in reports) == [
        "number 5; replaced",
        "number 9; replaced",
        "number 9; replaced",
    ]


def test_a_sample_may_take_as_long_as_is_configured(
    hang: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 5000))
    monkeypatch.setattr(data_workers, "LOOK_INTERVAL_S", 0.01)
    reports: list[str] = []
    slow = Numbers(lambda epoch, sample: hang() if sample == 9 else None)
    of_epoch_0 = places(steps=5)
    assert contents(pool(slow, reports, timeout_s=5000).batches(of_epoch_0)) == EXPECTED[:5]
    assert reports == []


def test_replacements_that_help_are_not_futile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are in a long run."""
    monkeypatch.setattr(data_workers, "MAX_FUTILE_REPLACEMENTS", 3)

    def die(epoch: int, sample: int) -> None:
        if sample % 8 == 0 and once(tmp_path, f"died-{epoch}-{sample}"):
            os._exit(3)

    reports: list[str] = []
    made = pool(Numbers(die), reports, workers=1, prefetch=1).batches(places(steps=10))
    assert contents(made) == EXPECTED[:10]
    assert len(reports) == 2 * 5


def test_the_limit_of_futile_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_workers, "MAX_FUTILE_REPLACEMENTS", 2)
    reports: list[str] = []
    dead = Numbers(lambda epoch, sample: os._exit(7))
    with pytest.raises(DataError, match="the last one ended with exit code 7 at number "):
        contents(pool(dead, reports, workers=1).batches(places()))
    assert len(reports) == 2


def test_a_sample_is_given_up_by_itself(tmp_path: Path) -> None:
    """What it cost in one epoch does not count in the next, nor do its neighbours' deaths."""

    def die(epoch: int, sample: int) -> None:
        if sample < 8 and once(tmp_path, f"died-{epoch}-{sample}"):
            os._exit(3)

    reports: list[str] = []
    found = contents(pool(Numbers(die), reports, workers=1).batches(places(steps=10)))
    assert found == EXPECTED[:10]
    assert len(reports) == 2 * 8


def test_processes_outlive_what_a_terminal_or_a_scheduler_sends_to_all() -> None:
    reports: list[str] = []
    made = pool(Numbers(), reports).batches(places())
    found = [next(made).image[:, 0, 0].tolist()]
    for child in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid or 0, number)
    found += [numbers for numbers, _ in contents(made)]
    assert found == [numbers for numbers, _ in EXPECTED]
    assert reports == []


def test_a_second_sigterm_ends_a_process_and_so_does_a_main_one_that_hangs() -> None:
    told, tell = os.pipe()

    def live() -> None:
        data_workers._outlive_the_first_signal()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os.write(tell, bytes([signal.alarm(0)]))
        os.kill(os.getpid(), signal.SIGTERM)

    process = multiprocessing.get_context("fork").Process(target=live)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert data_workers.GRACE_S - 30 <= os.read(told, 1)[0] <= data_workers.GRACE_S
    os.close(told)
    os.close(tell)


def test_no_more_is_asked_for_than_is_held_ready() -> None:
    taken = 0

    def counted() -> Any:
        nonlocal taken
        for batch in places():
            taken += 1
            yield batch

    made = pool(Numbers(), prefetch=3).batches(counted())
    for number in range(4):
        next(made)
        assert taken == number + 3
    made.close()


def test_a_pool_makes_the_memory_that_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Refused(Exception):
        pass

    def table(*arguments: Any) -> None:
        asked.extend(arguments)
        raise Refused

    monkeypatch.setattr(data_workers, "TaskTable", table)
    samples = Numbers()
    with pytest.raises(Refused):
        next(pool(samples, workers=5, prefetch=3, pin=True).batches(places()))
    assert asked == [samples, 8, 5, 4, True]  # a slot more: the one that is being used


def look_at(
    monkeypatch: pytest.MonkeyPatch, at: list[int], times: list[float], gone: bool = False
) -> list[tuple[int, str]]:
    """What is replaced, and why, by looks at the times given, with a timeout of 10 s."""
    replaced: list[tuple[int, str]] = []
    clock = iter(times)
    process = SimpleNamespace(
        sentinel=77, exitcode=-9, kill=lambda: None, join=lambda timeout=None: None
    )
    crew: Any = SimpleNamespace(
        crew=[process] * len(at),
        answers=5,
        last_look=-math.inf,
        pool=SimpleNamespace(timeout_s=10.0),
        table=SimpleNamespace(at=at, since=[0.0] * len(at)),
        _hear=lambda: None,
        _replace=lambda worker, what: replaced.append((worker, what)),
    )

    def wait(objects: list[Any], timeout: float) -> list[Any]:
        assert objects == [5, *[77] * len(at)]
        assert timeout == min(data_workers.LOOK_INTERVAL_S, 2.5)
        return [77] if gone else []

    monkeypatch.setattr(data_workers, "wait", wait)
    monkeypatch.setattr(data_workers, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in times:
        data_workers._Crew._wait(crew)
    return replaced


def test_one_that_is_too_long_at_a_sample_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those between samples are left alone, however long ago the last one began."""
    assert look_at(monkeypatch, [-1, 3, 0], [9.0, 10.0]) == []
    replaced = [(worker, "gave no answer for 11 s") for worker in (1, 2)]
    assert look_at(monkeypatch, [-1, 3, 0], [9.5, 11.0]) == replaced


def test_a_pause_of_the_main_process_is_not_held_against_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may have been stopped too: only a second look in time counts."""
    assert look_at(monkeypatch, [0], [100.0]) == []
    assert look_at(monkeypatch, [0], [100.0, 102.0, 104.0]) == []
    assert len(look_at(monkeypatch, [0], [100.0, 102.0, 103.9])) == 1


def test_one_that_is_gone_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_at(monkeypatch, [-1], [0.0], gone=True) == [(0, "was killed by SIGKILL")]


def test_the_cause_of_a_death_in_words() -> None:
    causes = [data_workers._cause_of_death(code) for code in (3, -15, -200, None)]
    assert causes == [
        "ended with exit code 3",
        "was killed by SIGTERM",
        "ended with exit code -200",
        "ended with exit code None",
    ]


def test_processes_compute_with_one_thread_and_hear_signals() -> None:
    def check(epoch: int, sample: int) -> None:
        assert torch.get_num_threads() == 1
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(data_workers.SIGNALS)

    made = pool(Numbers(check)).batches(places())
    next(made)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(data_workers.SIGNALS)
    assert len(contents(made)) == 19


def test_processes_that_never_work_end_the_run() -> None:
    def die(epoch: int, sample: int) -> None:
        os._exit(1)

    with pytest.raises(DataError, match=r"do not stay alive.*exit code 1.*fewer --data.workers"):
        contents(pool(Numbers(die), prefetch=20, workers=4).batches(places()))


def test_faults_of_code_and_machine_are_told_apart() -> None:
    def fault(epoch: int, sample: int) -> None:
        raise KeyError("wrong code")

    def machine(epoch: int, sample: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(RuntimeError, match=r"(?s)a data worker failed.*in fault.*wrong code"):
        contents(pool(Numbers(fault)).batches(places()))

    def wordy(epoch: int, sample: int) -> None:
        raise KeyError("x" * 20_000 + "the end")

    with pytest.raises(RuntimeError, match=r"xxx.*the end"):
        contents(pool(Numbers(wordy)).batches(places()))
    with pytest.raises(DataError, match=r"^\[Errno 24\] Too many open files$"):
        contents(pool(Numbers(machine)).batches(places()))


def test_leaving_early_ends_the_processes() -> None:
    hang = Numbers(lambda epoch, sample: time.sleep(1000 if epoch else 0))
    generator = pool(hang).batches(places())
    next(generator)
    started = time.monotonic()
    generator.close()
    assert time.monotonic() - started < 500  # it waited for none of them


def test_processes_follow_a_killed_parent() -> None:
    told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        generator = pool(Numbers()).batches(places())
        next(generator)
        children = multiprocessing.active_children()
        os.write(tell, b" ".join(b"%d" % (child.pid or 0) for child in children))
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(tell)
    os.waitpid(parent, 0)
    children = [int(pid) for pid in os.read(told, 100).split()]
    os.close(told)
    assert len(children) == 2
    deadline = time.monotonic() + 120
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def resident_bytes() -> int:
    """Private memory of this process and its children."""
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean", "Private_Dirty")):
                total += 1024 * int(line.split()[1])
    return total


@pytest.mark.slow
def test_memory_does_not_grow_over_10000_batches(write_image: Callable[..., Path]) -> None:
    """The trend over the last 8,000 batches: below 100 bytes a batch.

    All images are of one size: among large and small ones the memory allocator's own reserve
    wanders by more than that.
    """
    from simmim.data.augment import Augmentation
    from simmim.data.open import open_source
    from simmim.data.producer import SourceSamples
    from simmim.data.views import CroppedView

    augmentation = Augmentation((64, 64), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3)
    paths = [write_image(f"photos/{number:02d}.jpg", size=(500, 375)) for number in range(24)]
    samples = SourceSamples(open_source(str(paths[0].parent)), CroppedView(augmentation, 0))
    order = MicroBatches(SampleOrder(len(samples.source.names), 0), 2, 1, 0, 1, 0, 10_000)
    generator = WorkerPool(
        samples, 2, workers=2, prefetch=4, timeout_s=60, report=lambda line: None
    ).batches(order)
    counts, sizes = [], []
    for number, _ in enumerate(generator):
        if number >= 2000 and number % 500 == 0:
            counts.append(number)
            sizes.append(resident_bytes())
    slope = np.polyfit(counts, sizes, 1)[0]
    assert slope < 100, list(zip(counts, sizes))
