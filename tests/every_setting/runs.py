"""Two runs of a command that trains, tiny and in this process, and their fingerprints."""

import contextlib
import io
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from every_setting import fingerprint, stand_ins
from every_setting.case import EXIT_CODE, Case, Fingerprint, check
from simmim import cli, command_line
from simmim.config.values import leaves


@dataclass(frozen=True)
class Made:
    """A run that was made: what it left behind, and the settings that it was made with."""

    fingerprint: Fingerprint
    settings: dict[str, Any]


class Pairs(ABC):
    """Makes what the cases of a list compare, and keeps what several of them compare with."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, ...], Made] = {}

    @abstractmethod
    def make(self, settings: Sequence[str]) -> Made:
        """Make a run with settings, such as "train.steps=4", beside those of every run."""

    def check(self, case: Case) -> None:
        """Make both runs of a case, and compare them; see `case.check`."""
        if case.beside not in self.known:
            self.known[case.beside] = self.make(case.beside)
        before = self.known[case.beside]
        after = self.make([*case.beside, f"{case.setting}={case.value}"])
        differing = {
            key
            for key in before.settings.keys() & after.settings.keys()
            if before.settings[key] != after.settings[key]
        }
        # a run with another method has another table [method]
        differing -= {"method.name"} - {case.setting}
        # one that is refused at once has no settings
        assert differing == {case.setting} or not after.settings, (
            f"{case}: the two runs differ in {', '.join(sorted(differing)) or 'nothing'}"
        )
        check(case, before.fingerprint, after.fingerprint)


class Runs(Pairs):
    """Makes runs of a command that trains.

    Args:
        command: "pretrain" or "finetune".
        recipe: TOML of what every run has; $NAME is one of `inputs`, as in the values of cases.
        folder: for their files.
        inputs: name → path.
    """

    def __init__(self, command: str, recipe: str, folder: Path, inputs: Mapping[str, Path]) -> None:
        super().__init__()
        self.command, self.folder, self.inputs = command, folder, inputs
        folder.mkdir()
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(filled(recipe, inputs))
        self.count = 0

    def make(self, settings: Sequence[str]) -> Made:
        """See `Pairs`."""
        self.count += 1
        work = self.folder / f"run{self.count}"
        work.mkdir()
        flags = [f"--{filled(setting, self.inputs)}" for setting in settings]
        seen: Fingerprint = {}
        configs: list[Any] = []
        with pytest.MonkeyPatch.context() as patch, inside(work), captured() as (_, error):
            patch.setattr(command_line, "make_parser", make_parser_once)
            _record_configuration(patch, self.command, configs)
            stand_ins.watch(patch, seen)
            code = cli.main([self.command, str(self.recipe), *flags])
        lines = [line.replace(str(work), "WORK") for line in error.getvalue().splitlines()]
        found = {
            **seen,
            **fingerprint.of_run(work),
            EXIT_CODE: code,
            "error": [line for line in lines if line.startswith("simmim: error")],
            "notes": [line for line in lines if " has no effect " in line],
        }
        shutil.rmtree(work)
        return Made(found, leaves(configs[0]) if configs else {})


def _record_configuration(patch: pytest.MonkeyPatch, command: str, configs: list[Any]) -> None:
    module = import_module(f"simmim.commands.{command}")
    name = "load" if command == "pretrain" else "load_finetuning"
    load = getattr(module, name)

    def record(arguments: list[str]) -> Any:
        configs.append(load(arguments))
        return configs[0]

    patch.setattr(module, name, record)


def filled(text: str, inputs: Mapping[str, Path]) -> str:
    """A text with the paths of inputs in place of their $NAMES."""
    return re.sub(r"\$(\w+)", lambda match: str(inputs[match[1]]), text)


# a parser is made anew for every command line, and making one takes longer than a run here
make_parser_once = cache(command_line.make_parser)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is printed to standard output and to standard error."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
