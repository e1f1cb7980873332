"""Calls of commands that do not train, in this process, and what they leave behind."""

import argparse
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from every_setting import stand_ins
from every_setting.case import EXIT_CODE, Fingerprint
from every_setting.fingerprint import digests, files, pixels, shapes, text
from every_setting.runs import Made, Pairs, captured, filled, inside
from simmim import cli
from simmim.commands import labelled_features

# Results beside which a file repeats what the command was given.
RESULTS = {"probe.json": "layers", "knn.json": "scores"}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command that does not train."""
    made: argparse.ArgumentParser = import_module(f"simmim.commands.{command}").parser()
    return made


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every argument of a parser but --help, by its flag or its name."""
    return {
        action.option_strings[-1] if action.option_strings else action.dest: action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    }


class Calls(Pairs):
    """Makes calls of a command.

    Args:
        command: one that does not train.
        given: what every call has, such as "source=$images" or "--workers=0"; a value may have
            spaces between its parts.
        folder: for its files.
        inputs: name → path.
    """

    def __init__(
        self, command: str, given: Sequence[str], folder: Path, inputs: Mapping[str, Path]
    ) -> None:
        super().__init__()
        self.command, self.given, self.folder, self.inputs = command, given, folder, inputs
        folder.mkdir()
        self.count = 0

    def make(self, settings: Sequence[str]) -> Made:
        """See `Pairs`."""
        self.count += 1
        work = self.folder / f"call{self.count}"
        work.mkdir()
        arguments = self._arguments([*self.given, *settings])
        seen: Fingerprint = {}
        with pytest.MonkeyPatch.context() as patch, inside(work), captured() as (out, error):
            stand_ins.watch(patch, seen)
            _watch_features(patch, seen)
            _count_processes(patch, seen)
            try:
                code: Any = cli.main([self.command, *arguments])
            except SystemExit as ended:  # of argparse
                code = ended.code
        found = {
            **seen,
            EXIT_CODE: code,
            "printed": self._lines(out.getvalue(), work),
            # lines of progress have speeds
            "messages": [x for x in self._lines(error.getvalue(), work) if "images/s" not in x],
            "files": files(work),
            "content": {name: _content(work / name) for name in files(work)},
        }
        shutil.rmtree(work)
        try:
            settings_made = vars(parser_of(self.command).parse_args(arguments))
        except SystemExit:
            return Made(found, {})
        names = {a.dest: name for name, a in actions_of(parser_of(self.command)).items()}
        return Made(found, {names[dest]: value for dest, value in settings_made.items()})

    def _arguments(self, settings: Sequence[str]) -> list[str]:
        """The command line; of a setting that comes twice, the later one counts."""
        values: dict[str, str] = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            values[name] = filled(value, self.inputs)
        positional, flags = [], []
        for name, action in actions_of(parser_of(self.command)).items():
            if name not in values:
                continue
            if not action.option_strings:
                positional += values[name].split()
            elif action.nargs == 0 or " " in values[name]:
                flags += [name, *values[name].split()]
            else:
                flags.append(f"{name}={values[name]}")
        return [*positional, *flags]

    def _lines(self, text: str, work: Path) -> list[str]:
        return text.replace(str(work), "WORK").splitlines()


def _watch_features(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    seen["features"] = []
    extract = labelled_features.extract_features

    def watched(*arguments: Any, **options: Any) -> Any:
        made = extract(*arguments, **options)
        seen["features"].append((digests(made.layers), shapes(made.layers)))
        return made

    patch.setattr(labelled_features, "extract_features", watched)


def _count_processes(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    seen["processes"] = 0
    start = BaseProcess.start

    def counted(process: BaseProcess) -> None:
        seen["processes"] += 1
        start(process)

    patch.setattr(BaseProcess, "start", counted)


def _content(path: Path) -> Any:
    """What a file holds, but for what repeats the command line."""
    if path.suffix == ".png":
        return pixels(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as reader:
            notes = reader.metadata()
        tensors = load_file(path)
        return digests(tensors), shapes(tensors), notes
    if path.suffix == ".npy":
        return np.load(path).tobytes()
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            return [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    if path.name in RESULTS:
        return json.loads(path.read_text())[RESULTS[path.name]]
    # it lists the options of `simmim pack`
    return None if path.name == "dataset.json" else text(path)
