"""A pack that is killed, interrupted or out of disk: the same command goes on where it was."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packed_folders import FORK, contents, count_calls, run, wait_until
from simmim.data.folder import FolderSource
from simmim.data.labels import Labels
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.errors import DataError, RunError
from simmim.packing import plan
from simmim.packing.encode import Encoded, encode
from simmim.packing.options import Options
from simmim.packing.pack import claimed, pack
from simmim.packing.verify import verify


def in_child(work: Callable[[], object], log: Path | None = None) -> Any:
    """A forked process, of a group of its own, that does `work` and exits with what it returns."""

    def begin() -> None:
        os.setpgid(0, 0)
        # a shell's background job inherits Ctrl-C as ignored, and Python then leaves it so
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if log is not None:
            sys.stdout = sys.stderr = log.open("w", buffering=1)
        code = work()
        os._exit(code if isinstance(code, int) else 0)

    process = FORK.Process(target=begin)
    process.start()
    return process


def kill_at(moment: int, main_too: bool) -> None:
    """SIGKILL this process or its worker before the n-th flush or rename of either."""
    main_process, steps = os.getpid(), mmap(-1, 8)

    def step() -> None:
        count = int.from_bytes(steps[:8], "little")
        steps[:8] = (count + 1).to_bytes(8, "little")
        if count == moment:
            if main_too:
                os.kill(main_process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            step()
            return real(*arguments)

        return call

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)  # type: ignore[assignment]


def test_killed_before_every_flush_and_rename(small: Path, tmp_path: Path) -> None:
    source, options = FolderSource(small / "cat"), Options(short_side=64, images_per_shard=4)
    labels = Labels(np.arange(7) % 2, ("even", "odd"))
    pack(source, tmp_path / "whole", options, labels)
    expected = contents(tmp_path / "whole")

    def work(folder: Path, moment: int) -> int:
        kill_at(moment, main_too=moment % 2 == 1)
        try:
            pack(source, folder, options, labels, workers=1)
        except RunError as error:
            return 3 if "died (signal SIGKILL)" in str(error) else 4
        return 0

    codes = []
    while 0 not in codes:
        folder = tmp_path / str(len(codes))
        process = in_child(lambda folder=folder: work(folder, len(codes)))  # type: ignore[misc]
        process.join()
        codes.append(process.exitcode)
        partial = contents(folder)
        pack(source, folder, options, labels)
        assert contents(folder) == expected
        for name in partial:  # what was finished stays as it was
            if name.endswith(".json") and name != "dataset.json":
                assert partial[name] == expected[name]
    # in both processes; two shards of three files, and the folder's own three
    assert set(codes) == {0, 3, -signal.SIGKILL}
    assert len(codes) == 30


def test_killed_again_and_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the main process of two workers, five times, into the same folder."""
    source, options = FolderSource(small), Options(short_side=64, images_per_shard=2)
    pack(source, tmp_path / "whole", options)
    folder, draw = tmp_path / "killed", random.Random(7)
    with monkeypatch.context() as patch:
        for _ in range(5):
            # Two of 14 images at most come before this one, and it waits for the kill: after all
            # five, two shards are still to be made.
            last = draw.randint(1, 3)
            calls = count_calls(patch, lambda count, last=last: count >= last and until_orphaned())
            process = in_child(lambda: pack(source, folder, options, workers=2))
            wait_until(lambda calls=calls, last=last: calls() >= last)
            time.sleep(draw.uniform(0, 0.01))  # the other worker, and this one's files, go on
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            wait_until(lambda: is_free(folder))  # orphans hold the lock until they end
    process = in_child(lambda: pack(source, folder, options, workers=2))
    process.join()
    assert process.exitcode == 0
    wait_until(lambda: not list(folder.glob(".*")))  # an orphan's last file
    assert contents(folder) == contents(tmp_path / "whole")


def is_free(folder: Path) -> bool:
    """Whether another pack may begin in a folder."""
    try:
        with claimed(folder):
            return True
    except DataError:
        return False


def until_orphaned() -> None:
    """Wait, in a worker, for the end of the process that began it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        time.sleep(0.002)


def test_no_process_outlives_a_killed_pack(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = tmp_path / "workers"
    workers.mkdir()

    def note(number: int) -> None:
        (workers / str(os.getpid())).touch()
        until_orphaned()

    count_calls(monkeypatch, note)
    process = in_child(
        lambda: pack(
            FolderSource(small), tmp_path / "packed", Options(images_per_shard=4), workers=2
        )
    )
    wait_until(lambda: len(list(workers.iterdir())) == 2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not any(Path("/proc", p.name).exists() for p in workers.iterdir()))


def test_a_dead_worker_is_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    last = (small / FolderSource(small).names[13]).read_bytes()

    def deadly(data: bytes, options: Options) -> Encoded:
        if data == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(data, options)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", deadly)
        assert run(small, folder, "--images-per-shard", 7, "--workers", 1) == 1
    error = capsys.readouterr().err
    assert f"the process at {folder}/000001.tar died (signal SIGKILL): out of memory" in error
    assert error.count("\n") == 1
    assert sorted(contents(folder)) == ["000000.idx", "000000.json", "000000.tar", "dataset.json"]
    assert run(small, folder, "--images-per-shard", 7) == 0


def test_an_unfinished_pack_is_not_trained_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Plan, "finish", lambda *_: None)
    pack(FolderSource(small), tmp_path / "packed", Options())
    for use in (lambda: open_source(str(tmp_path / "packed")), lambda: verify(tmp_path / "packed")):
        with pytest.raises(DataError, match="a pack that is not finished"):
            use()


def test_ctrl_c_is_one_line_and_resumable(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = tmp_path / "packed", (small, tmp_path / "packed", "--images-per-shard", 3)
    # a worker takes the first shard, and the next; the other stays at the second
    first = [FolderSource(small).read(number) for number in range(3)]

    def hold(data: bytes, options: Options) -> Encoded:
        if data not in first:
            (tmp_path / str(os.getpid())).touch()
            until_orphaned()
        return encode(data, options)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", hold)
        process = in_child(lambda: run(*arguments, "--workers", 2), tmp_path / "log")
        wait_until(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2)
        os.killpg(process.pid, signal.SIGINT)
        process.join()
    assert process.exitcode == 130
    text = (tmp_path / "log").read_text()
    assert text == "simmim: interrupted; what is finished stays, the same command goes on\n"
    left = contents(folder)
    assert not any(name.startswith(".") for name in left)
    assert [name for name in left if name.endswith(".json")] == ["000000.json", "dataset.json"]
    assert run(*arguments) == 0
    assert run(small, tmp_path / "whole", "--images-per-shard", 3) == 0
    assert contents(folder) == contents(tmp_path / "whole")


def test_files_that_cannot_grow(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = tmp_path / "packed", (small, tmp_path / "packed", "--images-per-shard", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        code = run(*arguments, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    error = capsys.readouterr().err
    assert "File too large; what is finished stays" in error
    assert error.count("\n") == 1
    assert not any(name.startswith(".") for name in contents(folder))
    assert run(*arguments) == 0


@pytest.mark.slow  # what a file that cannot grow shows, on a disk of its own
def test_a_full_disk(small: Path, tmp_path: Path) -> None:
    """A tiny file system in a mount namespace of its own; then the same, enlarged."""
    folder = tmp_path / "packed"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(["unshare", "-rm", *mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    script = f"""
import os, subprocess, sys
from simmim.cli import main
subprocess.run({mount}, check=True)
arguments = ["pack", {str(small)!r}, {str(folder)!r}, "--images-per-shard", "3", "--workers", "2"]
print(main(arguments), *sorted(os.listdir({str(folder)!r})))
subprocess.run(["mount", "-o", "remount,size=20m", {str(folder)!r}], check=True)
print(main(arguments))
print(main(["pack", "--verify", {str(folder)!r}]))
"""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script], capture_output=True, text=True
    )
    first, _, second, _, verified = done.stdout.splitlines()
    assert first.startswith("1 0000")
    assert "tmp" not in first
    assert second == verified == "0"
    assert "No space left on device; what is finished stays" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_source_that_vanishes_ends_the_pack(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Source = FolderSource(small)

    def gone(index: int) -> bytes:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(source, "read", gone)
    monkeypatch.setattr(plan, "MAX_UNREADABLE_IN_A_ROW", 10)
    with pytest.raises(RunError, match="the last 10 images could all not be read"):
        pack(source, tmp_path / "packed", Options())
