"""What a configuration class says of its keys: defaults, and the values that are allowed."""

import math
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from simmim.config.bounds import Bounds
from simmim.config.sections import RunConfig
from simmim.config.values import leaf_types, leaves


def keys_of(cls: type[RunConfig]) -> dict[str, tuple[Any, str]]:
    """Every key with its default and, in words, its choices or bounds ("(0, 1] rising")."""
    types, bounds, defaults = leaf_types(cls), dict(bounds_of(cls())), leaves(cls())
    return {
        key: (default, _choices(types[key]) or _interval(bounds.get(key)))
        for key, default in defaults.items()
    }


def bounds_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, Bounds]]:
    """The keys of a dataclass that have bounds."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from bounds_of(value, f"{prefix}{field.name}.")
        elif "bounds" in field.metadata:
            yield prefix + field.name, field.metadata["bounds"]


def _choices(kind: Any) -> str:
    literals = (k for k in (kind, *typing.get_args(kind)) if typing.get_origin(k) is typing.Literal)
    return " ".join(choice for literal in literals for choice in typing.get_args(literal))


def _interval(bounds: Bounds | None) -> str:
    if bounds is None:
        return ""
    low = f"[{bounds.low:.9g}" if bounds.above is None else f"({bounds.above:.9g}"
    words = [] if low == "[-inf" and bounds.high == math.inf else [f"{low}, {bounds.high:.9g}]"]
    return " ".join([*words, *([] if bounds.order == "any" else [bounds.order])])
