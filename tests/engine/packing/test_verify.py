"""Damage to a packed folder is found and named."""

import json
from pathlib import Path

import pytest

from packed_folders import index_of, run
from simmim.commands import pack as pack_command
from simmim.packing import plan
from simmim.packing.encode import Encoded


def test_verify_names_every_damage(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    assert run(small, folder, "--images-per-shard", 4) == 0
    index = index_of(folder, 0)
    with (folder / "000000.tar").open("r+b") as file:
        file.seek(index["offset"][1] + 30)
        file.write(b"\0\1\2")
        file.seek(index["offset"][2] + index["size"][2] + -index["size"][2] % 512 + 512)
        file.write(b"9")
    (folder / "000001.tar").unlink()
    (folder / "000002.idx").write_text("v1.2 4\n")
    wrong = index_of(folder, 3)
    wrong["width"][0] += 1
    (folder / "000003.json").write_text(json.dumps(wrong))
    capsys.readouterr()
    assert run("--verify", folder) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("000000.tar: 00000001.jpg: damaged")
    assert lines[1] == "000000.tar: 00000002.jpg: its label is not 0"
    assert lines[2].startswith("000001.tar: No such file")
    assert lines[3] == "000002.tar: its .idx is damaged"
    assert lines[4].startswith("000003.tar: 00000012.jpg: is [")
    assert len(lines) == 5
    assert "5 problems" in error


def test_verify_decodes_and_limits_its_lines(
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Encoded(b"no image", "jpg", 5, 5, 3)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", lambda data, options: broken)
        assert run(small, tmp_path / "packed") == 0
    monkeypatch.setattr(pack_command, "MAX_PROBLEMS", 5)
    capsys.readouterr()
    assert run("--verify", tmp_path / "packed") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("000000.tar: 00000000.jpg: unreadable: ")
    assert lines[5:] == ["… and 9 more"]
    assert run("--verify", small) == 2
    assert "dataset.json: No such file" in capsys.readouterr().err
