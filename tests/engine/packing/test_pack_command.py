"""The flags of `simmim pack`, and the progress that it shows."""

import os
import sys
import time
from pathlib import Path

import pytest

from packed_folders import count_calls, run
from simmim.commands import pack as pack_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "DEST is missing"),
        ([], "SOURCE is missing"),
        (["a", "b", "--quality", "101"], "101 is no integer from 1 to 100"),
        (["a", "b", "--short-side", "0"], "0 is no integer from 1"),
        (["a", "b", "--short-side", "9", "--keep-originals"], "leave out --short-side"),
        (["a", "b", "--quality", "50", "--keep-originals"], "leave out --quality"),
        (["a", "--verify", "b"], "leave out SOURCE"),
        (["--verify", "b", "--quality", "50"], "packs nothing: leave out --quality"),
        (["--verify", "b", "--max-pixels", "50"], "packs nothing: leave out --max-pixels"),
        (["--verify", "b", "--stats"], "packs nothing: leave out --stats"),
        (["a", "--stats", "--short-side", "50"], "packs nothing: leave out --short-side"),
        (["a", "--stats", "--labels", "b"], "packs nothing: leave out --labels"),
        (["a", "b", "--value-range", "2", "1"], "LOW must be less"),
        (["a", "b", "--overwrite"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_progress(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count_calls(monkeypatch, lambda number: time.sleep(0.05))
    monkeypatch.setattr(pack_command, "LINE_EVERY_S", 0.0)
    assert run(small, tmp_path / "lines", "--workers", 1) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("packed ") and "/14 images" in line for line in lines)
    assert "images/s  eta 0:0" in lines[-1]
    ours, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run(small, tmp_path / "bar", "--workers", 1) == 0
    # a read ends after 4 kB, perhaps within a character
    shown = os.read(ours, 1 << 16).decode(errors="ignore")
    os.close(ours)
    assert "images/s" in shown
    assert "/14" in shown
