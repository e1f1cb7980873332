"""Finds methods by name: every file of this package that defines a `Method`; no list names them."""

import difflib
import pkgutil
from functools import cache
from importlib import import_module

from simmim import method
from simmim.config.check import check_pretraining
from simmim.config.idle import refuse_idle
from simmim.config.sections import Config
from simmim.errors import ConfigError
from simmim.method.method import Method


@cache
def methods() -> dict[str, type[Method]]:
    """Every method by its name."""
    by_name: dict[str, type[Method]] = {}
    for file in pkgutil.iter_modules(method.__path__):
        if file.name == "build":
            continue
        for value in vars(import_module(f"{method.__name__}.{file.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and value.name:
                by_name[value.name] = value
    return dict(sorted(by_name.items()))


def method_class(name: str) -> type[Method]:
    """The class of the method that `method.name` means.

    Raises:
        ConfigError: there is no such method; the message names the known ones.
    """
    known = methods()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    raise ConfigError(f"method.name={name} is unknown; {hint}")


def find_method(config: Config) -> Method:
    """The method of a run.

    Raises:
        ConfigError: there is no such method.
    """
    return method_class(config.method.name)(config)


def check_config(config: Config) -> None:
    """Raise ConfigError for anything that cannot run, before any data is read."""
    check_pretraining(config)
    method = find_method(config)
    method.check()
    refuse_idle(config, method.idle)
