"""Two runs of a command that trains, tiny and in this process, and their fingerprints."""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from every_setting import fingerprint, stand_ins
from every_setting.case import Case, Fingerprint, check
from simmim import cli, command_line
from simmim.config.values import leaves


@dataclass(frozen=True)
class Made:
    """A run that was made: what it left behind, and the settings that it was made with."""

    fingerprint: Fingerprint
    settings: dict[str, Any]


class Runs:
    """Makes runs of a command from a recipe, and keeps the fingerprints of those to compare with.

    Args:
        command: "pretrain" or "finetune".
        recipe: TOML of what every run has; $NAME is one of `inputs`, as in the values of cases.
        folder: for their files.
        inputs: name → path.
    """

    def __init__(self, command: str, recipe: str, folder: Path, inputs: Mapping[str, Path]) -> None:
        self.command, self.folder, self.inputs = command, folder, inputs
        folder.mkdir()
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(self._filled(recipe))
        self.known: dict[tuple[str, ...], Made] = {}
        self.count = 0

    def _filled(self, value: str) -> str:
        return re.sub(r"\$(\w+)", lambda match: str(self.inputs[match[1]]), value)

    def check(self, case: Case) -> None:
        """Make both runs of a case, and compare them; see `case.check`."""
        if case.beside not in self.known:
            self.known[case.beside] = self.run(case.beside)
        before = self.known[case.beside]
        after = self.run([*case.beside, f"{case.setting}={case.value}"])
        differing = {
            key
            for key in before.settings.keys() & after.settings.keys()
            if before.settings[key] != after.settings[key]
        }
        # a run with another method has another table [method]
        differing -= {"method.name"} - {case.setting}
        assert differing == {case.setting}, (
            f"{case}: the two runs differ in {', '.join(sorted(differing)) or 'nothing'}"
        )
        check(case, before.fingerprint, after.fingerprint)

    def run(self, settings: Sequence[str]) -> Made:
        """Make a run with settings, such as "train.steps=4", beside those of the recipe."""
        self.count += 1
        work = self.folder / f"run{self.count}"
        work.mkdir()
        flags = [f"--{self._filled(setting)}" for setting in settings]
        command = import_module(f"simmim.commands.{self.command}")
        load, loaded = (
            (command.load, "load")
            if self.command == "pretrain"
            else (command.load_finetuning, "load_finetuning")
        )
        configs: list[Any] = []
        seen: Fingerprint = {}

        def record(arguments: list[str]) -> Any:
            configs.append(load(arguments))
            return configs[0]

        with pytest.MonkeyPatch.context() as patch, inside(work), captured() as (_, error):
            patch.setattr(command_line, "make_parser", _parser)
            patch.setattr(command, loaded, record)
            stand_ins.watch(patch, seen)
            code = cli.main([self.command, str(self.recipe), *flags])
        lines = [line.replace(str(work), "WORK") for line in error.getvalue().splitlines()]
        found = {
            **seen,
            **fingerprint.of_run(work),
            "exit code": code,
            "error": [line for line in lines if line.startswith("simmim: error")],
            "notes": [line for line in lines if " has no effect " in line],
        }
        shutil.rmtree(work)
        return Made(found, leaves(configs[0]) if configs else {})


# a parser is made anew for every command line, and making one takes longer than a run here
_parser = cache(command_line.make_parser)


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


def write_images(folder: Path, count: int, seed: int, sizes: tuple[tuple[int, int], ...]) -> Path:
    """Smooth random pictures, of the sizes (width, height) in turn."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        small = draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(
            sizes[number % len(sizes)], Image.Resampling.BICUBIC
        )
        picture.save(folder / f"{number:02d}.png")
    return folder


def write_deep_images(folder: Path, count: int, seed: int) -> Path:
    """Arrays of 16 bits, most of whose range is empty."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        values = draw.integers(0, 4096, (40, 44, 3))
        np.save(folder / f"{number:02d}.npy", values.astype(np.uint16))
    return folder


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
