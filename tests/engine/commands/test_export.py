"""`simmim export`: every flag arrives, and what was written is told."""

from pathlib import Path
from typing import Any

import pytest

from recorded_calls import record
from simmim.commands import export as command

DEFAULT: dict[str, Any] = {
    "path": "run",
    "images": [],
    "with_picture": True,
    "license": "unknown",
    "overwrite": False,
}


class SomeModel:
    """What is exported."""


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--images", "a.png", "b.png"], {"images": [Path("a.png"), Path("b.png")]}),
        (["--no-picture"], {"with_picture": False}),
        (["--license=apache-2.0"], {"license": "apache-2.0"}),
        (["--overwrite"], {"overwrite": True}),
    ],
)
def test_every_flag_arrives(
    flags: list[str],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = record(monkeypatch, command, "export", lambda **given: SomeModel())
    for name in ("model.safetensors", "README.md", "notes.txt"):
        (tmp_path / name).write_text("")
    assert command.main(["run", str(tmp_path), *flags]) == 0
    assert calls == [DEFAULT | {"folder": tmp_path} | options]
    assert capsys.readouterr().out == f"{tmp_path}: SomeModel; model.safetensors, README.md\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "a.png", "--no-picture"], "leave out --no-picture"),
        (["--license=a: b"], "--license a: b: give an identifier of the Hub's"),
        (["--license="], "give an identifier of the Hub's"),
    ],
)
def test_flags_that_contradict_one_another(
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = record(monkeypatch, command, "export")
    with pytest.raises(SystemExit) as stop:
        command.main(["run", "folder", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**given: Any) -> None:
        raise ValueError("folder: is the folder of a run")

    record(monkeypatch, command, "export", refuse)
    assert command.main(["run", "folder"]) == 2
    assert capsys.readouterr().err == "simmim: error: folder: is the folder of a run\n"
