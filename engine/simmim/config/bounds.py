"""The bounds of a setting, which stand on its field, and the check of every field that has some."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

from simmim.errors import ConfigError

T = TypeVar("T")

Order = Literal["any", "rising", "strictly rising"]

_KEY = "bounds"


@dataclass(frozen=True)
class Bounds:
    """What a number, or every number of a list, may be.

    Attributes:
        low: the smallest.
        high: the largest.
        above: the number that all must exceed; None where there is none.
        order: of the numbers of a list.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float | None = None
    order: Order = "any"

    def check(self, key: str, value: Any) -> None:
        """Raise ConfigError where a value is out of bounds; None is an unset one, and is not.

        Args:
            key: the setting's, for the message.
            value: a number, or a list of numbers.
        """
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in numbers:
            if number is not None and not self._allows(number):
                raise ConfigError(f"{key}={number} must be {self}")
        if self.order == "any" or value is None:
            return
        pairs = pairwise(numbers)
        if not all(a < b if self.order == "strictly rising" else a <= b for a, b in pairs):
            raise ConfigError(f"{key}={list(value)} must rise")

    def _allows(self, number: float) -> bool:
        return self.low <= number <= self.high and (self.above is None or number > self.above)

    def __str__(self) -> str:
        if self.above is not None:
            most = "" if self.high == math.inf else f" and at most {self.high:g}"
            return f"above {self.above:g}{most}"
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


def bounded(
    default: T,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
    order: Order = "any",
) -> T:
    """A field of a dataclass with a default and `Bounds`."""
    made: T = field(default=default, metadata={_KEY: Bounds(low, high, above, order)})
    return made


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first field of a dataclass whose value is out of its bounds."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            check_bounds(value, f"{prefix}{f.name}.")
        elif _KEY in f.metadata:
            f.metadata[_KEY].check(prefix + f.name, value)
