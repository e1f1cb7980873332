"""Configurations as keys, plain values and TOML."""

import difflib
import json
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from typing import Any, TypeVar

from simmim.config.sections import Config, MethodConfig, RunConfig

ConfigT = TypeVar("ConfigT")


def config_class(settings: type[MethodConfig]) -> type[Config]:
    """The class of the pre-training runs of a method, whose [method] table `settings` describes."""
    if settings not in _CONFIG_CLASSES:
        _CONFIG_CLASSES[settings] = make_dataclass(
            "Config",
            [("method", settings, field(default_factory=settings))],
            bases=(Config,),
            namespace={"__doc__": Config.__doc__, "__module__": Config.__module__},
            frozen=True,
            kw_only=True,
        )
    return _CONFIG_CLASSES[settings]


_CONFIG_CLASSES: dict[type[MethodConfig], type[Config]] = {MethodConfig: Config}


def leaf_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every key ("train.steps") and its type."""
    hints = typing.get_type_hints(cls)
    types: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            types |= leaf_types(hints[f.name], f"{prefix}{f.name}.")
        else:
            types[prefix + f.name] = hints[f.name]
    return types


def leaves(config: RunConfig) -> dict[str, Any]:
    """Every key ("train.steps") and its value."""
    return dict(flatten(asdict(config)))


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or a list of what there is when nothing is near."""
    by_tail = {k.rsplit(".", 1)[-1]: k for k in known}
    if match := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean {match[0]}?"
    if match := difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_tail), n=1, cutoff=0.7):
        return f"did you mean {by_tail[match[0]]}?"
    return f"known are {', '.join(known)}"


def to_toml(config: RunConfig) -> str:
    """The resolved configuration, every key, as TOML; unset keys are left out."""
    top, sections = [], []
    for key, value in asdict(config).items():
        if isinstance(value, dict):
            lines = [f"{k} = {toml_value(v)}" for k, v in value.items() if v is not None]
            sections.append("\n".join([f"[{key}]", *lines]))
        elif value is not None:
            top.append(f"{key} = {toml_value(value)}")
    return "\n\n".join(["\n".join(top), *sections]) + "\n"


def toml_value(value: Any) -> str:
    """A plain value in the notation of TOML: JSON's, but for infinite numbers and for DEL."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def from_dict(values: dict[str, Any], cls: type[ConfigT]) -> ConfigT:
    """A configuration from nested plain values (as `dataclasses.asdict` gives them)."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            arguments[name] = from_dict(value, typing.cast(type, hints[name]))
        elif isinstance(value, list) and "tuple" in str(hints[name]):
            arguments[name] = tuple(value)
        else:
            arguments[name] = value
    return cls(**arguments)
