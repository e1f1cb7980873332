"""From a command line to a checked configuration: recipes, TOML files, `--section.key=value`."""

import argparse
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from simmim.config.finetune import FinetuneConfig, check_finetuning
from simmim.config.idle import IDLE, Idle, idle_notes
from simmim.config.moved_keys import MOVED, current_key, move_keys, moved_value
from simmim.config.sections import Config, MethodConfig, RunConfig
from simmim.config.values import config_class, flatten, from_dict, leaf_types, nearest
from simmim.environment import Launch
from simmim.errors import ConfigError
from simmim.method.build import check_config, method_class

RunConfigT = TypeVar("RunConfigT", bound=RunConfig)

# The shipped recipes of fine-tuning begin with this; all others are of pre-training.
FINETUNE_PREFIX = "finetune_"


def find_recipe(name: str) -> Path:
    """The TOML file that a path or the name of a shipped recipe means.

    Raises:
        ConfigError: there is no such file or recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipes = {p.stem: p for folder in recipe_folders() for p in sorted(folder.glob("*.toml"))}
    if name in recipes:
        return recipes[name]
    if path.suffix == ".toml" or len(path.parts) > 1:
        if path.stem in recipes and not path.parent.exists():
            return recipes[path.stem]
        raise ConfigError(f"{name}: no such config file")
    raise ConfigError(f"{name}: no such config file or recipe; {nearest(name, sorted(recipes))}")


def recipe_folders() -> list[Path]:
    """Where shipped recipes lie: inside the installed package, or in the source tree."""
    here = Path(__file__).resolve()
    candidates = (here.parent / "configs", here.parents[2] / "configs")
    return [folder for folder in candidates if folder.is_dir()]


def recipe_names(*, finetuning: bool) -> list[str]:
    """The shipped recipes of fine-tuning, or those of pre-training."""
    names = {p.stem for folder in recipe_folders() for p in folder.glob("*.toml")}
    return sorted(name for name in names if name.startswith(FINETUNE_PREFIX) == finetuning)


def read_toml(path: Path, cls: type = Config) -> dict[str, Any]:
    """A TOML file whose keys are all known.

    Raises:
        ConfigError: unreadable, not TOML, or an unknown key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    known = leaf_types(cls)
    for key, _ in flatten(values):
        if key not in known and key not in MOVED:
            raise ConfigError(f"{path}: unknown key {key}; {nearest(key, list(known))}")
    return values


@cache  # made of its arguments alone, and the larger part of the time that `load` takes
def make_parser(program: str, cls: type = Config, purpose: str = "Pre-train an encoder") -> Any:
    """The command line of a training command: one typed flag per key, documented from its class."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        usage=f"{program} CONFIG [--section.key=value …]",
        description=f"{purpose}. CONFIG is a TOML file or the name of a shipped recipe.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(cls, None, fail_untyped=True)
    return parser


def load(arguments: Sequence[str], program: str = "simmim pretrain") -> Config:
    """The configuration that a command line of pre-training asks for; see `load_as`.

    Its class is that of the method that it names, whose own keys are in [method].
    """
    method = method_class(_method_named(arguments))
    purpose = "Pre-train an encoder"
    cls, rules = config_class(method.Settings), (*IDLE, *method.idle)
    return load_as(cls, check_config, arguments, program, purpose, rules)


def load_finetuning(arguments: Sequence[str], program: str = "simmim finetune") -> FinetuneConfig:
    """The configuration that a command line of fine-tuning asks for; see `load_as`."""
    purpose = "Fine-tune a classifier"
    return load_as(FinetuneConfig, check_finetuning, arguments, program, purpose, IDLE)


def _method_named(arguments: Sequence[str]) -> str:
    """The method of a command line, before anything of it is checked."""
    name: Any = MethodConfig.name
    if arguments and not arguments[0].startswith("-"):
        try:
            values = tomllib.loads(find_recipe(arguments[0]).read_text(encoding="utf-8"))
            name = values["method"]["name"]
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, KeyError, TypeError):
            pass  # reading it for good says what is wrong
    for flag in arguments:
        if flag.startswith("--method.name="):
            name = flag.split("=", 1)[1]
    return name if isinstance(name, str) else MethodConfig.name


def load_as(
    cls: type[RunConfigT],
    check: Callable[[RunConfigT], None],
    arguments: Sequence[str],
    program: str,
    purpose: str,
    rules: Sequence[Idle],
) -> RunConfigT:
    """The configuration that a command line asks for, checked.

    Lines on standard error say which settings cannot act, and which keys are of earlier versions.

    Args:
        cls: of the configuration.
        check: raises ConfigError for one that cannot run.
        arguments: a TOML file or the name of a recipe, then `--section.key=value`.
        program: name for messages.
        purpose: what the command does, for `--help`.
        rules: say which settings cannot act.

    Raises:
        ConfigError: anything that cannot run; one line.
        SystemExit: `--help` was asked for.
    """
    pretraining = issubclass(cls, Config)
    parser = make_parser(program, cls, purpose)  # type: ignore[arg-type]  # a class is hashable
    if "--help" in arguments or "-h" in arguments:
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        names = recipe_names(finetuning=not pretraining)
        raise ConfigError(f"CONFIG is missing: a TOML file, or a recipe ({', '.join(names)})")
    recipe, flags = find_recipe(arguments[0]), list(arguments[1:])
    if recipe.stem.startswith(FINETUNE_PREFIX) == pretraining and _is_shipped(recipe):
        other = "finetune" if pretraining else "pretrain"
        raise ConfigError(f"{recipe.stem} is a recipe of `simmim {other}`")
    types = leaf_types(cls)
    values, notes = move_keys(read_toml(recipe, cls), cls, strict=True)
    for number, flag in enumerate(flags):
        name, equals, rest = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            continue
        if name in MOVED:
            flags[number] = f"--{current_key(name, cls)}{equals}{rest}"
            notes.append(moved_value(name, current_key(name, cls)))
        elif name not in types:
            raise ConfigError(f"unknown flag --{name}; {nearest(name, list(types))}")
    try:
        namespace = parser.parse_object(values)
        namespace = parser.parse_args(flags, namespace=namespace)
        config = from_dict(namespace.as_dict() if hasattr(namespace, "as_dict") else namespace, cls)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(_readable(str(error), types)) from None
    if not config.output:
        config = replace(config, output=str(Path("runs") / recipe.stem))
    check(config)
    if Launch.of_environment().rank == 0:  # every process finds the same
        for note in [*notes, *idle_notes(config, rules)]:
            print(f"simmim: {note}", file=sys.stderr)
    return config


def _is_shipped(recipe: Path) -> bool:
    return recipe.resolve().parent in [folder.resolve() for folder in recipe_folders()]


def _readable(message: str, types: dict[str, Any]) -> str:
    """The CLI library's type error as one line: key, expected type, value."""
    match = re.search(r'[Pp]arser key "([\w.]+)"', message)
    got = re.search(r"Got value: (.*)", message)
    if match and match[1] in types:
        expected = str(types[match[1]])
        expected = re.sub(r"typing\.|<class '(\w+)'>", lambda m: m[1] or "", expected)
        value = f", got {got[1].strip()!r}" if got else ""
        return f"{match[1]}: expected {expected}{value}"
    return " ".join(message.split())
