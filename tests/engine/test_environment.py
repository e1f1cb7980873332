"""The place of a process among torchrun's, and what is recorded of a machine."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from simmim import environment
from simmim.environment import Launch
from simmim.version import __version__


def test_alone_where_nothing_started_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.of_environment() == Launch(rank=0, size=1, local_rank=0, local_size=1)
    assert Launch.of_environment().cores == len(os.sched_getaffinity(0))


def test_torchrun_tells_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch = Launch.of_environment()
    assert launch == Launch(rank=5, size=8, local_rank=1, local_size=2)
    assert launch.cores == len(os.sched_getaffinity(0)) // 2


def test_what_is_recorded_of_a_start() -> None:
    record = environment.describe(torch.device("cpu"), 3)
    assert record["processes"] == 3
    assert record["versions"]["simmim"] == __version__
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["threads"] == torch.get_num_threads()
    assert record["device_name"]


def test_a_commit_tells_of_changes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "environment.py"
    file.write_text("one")
    monkeypatch.setattr(environment, "__file__", str(file))
    # a repository around the temporary folder would be found instead
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one", "--no-verify")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    file.write_text("two")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit() is None
