"""Which words the command knows: each is a file of commands/, and stands in the usage text."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TextIO

import pytest

from forked_command import ENVIRONMENT
from simmim import cli
from simmim.version import __version__


def test_every_word_is_told_and_is_a_file() -> None:
    assert re.findall(r"^  ([a-z]+) ", cli.USAGE, flags=re.MULTILINE) == list(cli.COMMANDS)


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_every_command_tells_of_its_arguments(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([word, "--help"])
    assert stop.value.code == 0
    assert f"usage: simmim {word} " in capsys.readouterr().out


def test_words_that_are_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == 2 * cli.USAGE
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"simmim {__version__}\n"
    for word in ("train", "arguments", "errors"):
        assert cli.main([word]) == 2
        assert capsys.readouterr().err.startswith(f"simmim: error: unknown command {word}; known")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt(), 130, "simmim: error: interrupted\n"), (BrokenPipeError(), 1, "")],
)
def test_interrupted_and_no_reader(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raising(names: list[str], image_size: int | None) -> None:
        raise error

    monkeypatch.setattr(import_module("simmim.commands.models"), "model_table", raising)
    assert cli.main(["models"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_a_word_runs_its_file_and_ends_with_its_code(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        given.append(arguments)
        return 75

    monkeypatch.setattr(import_module(f"simmim.commands.{word}"), "main", run)
    assert cli.main([word, "a", "--b=c"]) == 75
    monkeypatch.setattr(sys, "argv", ["simmim", word, "--d"])
    assert cli.main() == 75
    assert given == [["a", "--b=c"], ["--d"]]


def no_reader() -> TextIO:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full_disk() -> TextIO:
    return Path("/dev/full").open("w")


FULL = "simmim: error: standard output: No space left on device\n"


@pytest.mark.parametrize("words", [["recipes"], ["--help"], ["--version"], ["models", "vit_tiny"]])
@pytest.mark.parametrize(("make", "line"), [(no_reader, ""), (full_disk, FULL)])
def test_output_that_cannot_be_written(
    words: list[str],
    make: Callable[[], TextIO],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is written waits in a buffer, and is only found to have no place at the end."""
    with make() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(words) == 1
        output.flush()  # as the interpreter does at its end, which must not fail once more
    if words[0] == "models":  # found by the command itself, which flushes its lines
        line = line.replace("standard output: ", "")
    assert capsys.readouterr().err == line


def test_words_are_told_without_torch() -> None:
    code = "import sys; from simmim import cli; cli.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0].startswith("usage: simmim COMMAND")
    assert done.stdout.splitlines()[-1] == "False"
