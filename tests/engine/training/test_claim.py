"""The folder of a run: one process takes it, it holds nothing else, and every start is recorded."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from simmim.command_line import load
from simmim.config.sections import Config
from simmim.distributed import World
from simmim.errors import ConfigError
from simmim.training import claim
from simmim.training.claim import claimed_folder, claimed_run, record_start
from small_run import CPU

ALONE = World(0, 1, CPU)


def config_of(folder: Path) -> Config:
    return load(["smoke", "--data.path=photos", f"--output={folder}"])


def test_a_new_folder_is_made_and_found_again(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed_folder(config_of(tmp_path / "a" / "run"), ALONE) as folder:
            assert folder.root == tmp_path / "a" / "run"
            assert folder.lock.exists()


def test_a_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with claimed_folder(replace(config_of(tmp_path), output="~/mine"), ALONE) as folder:
        assert folder.root == tmp_path / "mine"


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with (
        pytest.raises(ConfigError, match="not empty, and holds no simmim run"),
        claimed_folder(config_of(tmp_path), ALONE),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="is a file; choose another folder"),
        claimed_folder(config_of(tmp_path / "thesis.tex"), ALONE),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    code = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigError, match="another process is training in this folder"),
            claimed_folder(config_of(tmp_path), ALONE),
        ):
            pass
        other.communicate()
    with claimed_folder(config_of(tmp_path), ALONE):
        pass


def test_other_processes_claim_nothing_and_fail_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, "output=x: another process is training in this folder"])
    monkeypatch.setattr(claim.distributed, "broadcast_object", lambda *_: next(answers))
    with claimed_folder(config_of(tmp_path), World(1, 2, CPU)) as folder:
        assert not folder.lock.exists()
    with (
        pytest.raises(ConfigError, match="another process is training"),
        claimed_folder(config_of(tmp_path), World(1, 2, CPU)),
    ):
        pass


def test_a_run_is_on_its_device_and_leaves_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, left = list[str](), list[World]()

    def init(device: str) -> World:
        devices.append(device)
        return ALONE

    monkeypatch.setattr(claim.distributed, "init", init)
    monkeypatch.setattr(claim.distributed, "finish", left.append)
    config = replace(config_of(tmp_path), device="cpu")
    with claimed_run(config) as (world, folder, _):
        assert (world, folder.root, left) == (ALONE, tmp_path, [])
    assert (devices, left) == (["cpu"], [ALONE])


def test_every_start_is_recorded(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with claimed_folder(config, ALONE) as folder:
        record_start(folder, config, ALONE, 0)
        record_start(folder, config, ALONE, 40)
    starts = json.loads(folder.starts.read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 40]
    assert starts[0]["versions"]["torch"]
    assert tomllib.loads(folder.config.read_text())["data"]["path"] == "photos"
