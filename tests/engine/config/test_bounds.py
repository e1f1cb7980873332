"""The bounds of settings: they stand on fields, and values beyond them are refused."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from simmim.config.bounds import Bounds, check_bounds
from simmim.config.finetune import FinetuneConfig
from simmim.config.values import config_class, leaves
from simmim.errors import ConfigError
from simmim.method.build import methods

CLASSES = {name: config_class(method.Settings) for name, method in methods().items()}
CLASSES["finetuning"] = FinetuneConfig  # type: ignore[assignment]


def bounds_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, Bounds]]:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from bounds_of(value, f"{prefix}{field.name}.")
        elif "bounds" in field.metadata:
            yield prefix + field.name, field.metadata["bounds"]


def changed(settings: Any, key: str, value: Any) -> Any:
    section, _, rest = key.partition(".")
    if rest:
        value = changed(getattr(settings, section), rest, value)
    return replace(settings, **{section: value})


def beyond(bounds: Bounds) -> list[float]:
    """Numbers just out of bounds, on each side that is closed."""
    limits = {bounds.low: -1, bounds.high: 1}
    numbers = [limit + sign * 1e-3 for limit, sign in limits.items() if math.isfinite(limit)]
    return numbers + ([] if bounds.above is None else [bounds.above, bounds.above - 1e-3])


CASES = [(name, key) for name, cls in CLASSES.items() for key, _ in bounds_of(cls())]


def test_most_numbers_have_bounds() -> None:
    free = {
        key
        for cls in CLASSES.values()
        for key, value in leaves(cls()).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    } - {key for _, key in CASES}
    # any seed is one; without steps, epochs must be above 0; a norm's window is odd
    assert free == {"seed", "train.epochs", "method.norm_target"}


@pytest.mark.parametrize(("name", "key"), CASES)
def test_every_bounded_field_refuses_what_is_beyond(name: str, key: str) -> None:
    settings = CLASSES[name]()
    check_bounds(settings)
    bounds, default = dict(bounds_of(settings))[key], leaves(settings)[key]
    for number in beyond(bounds):
        values = [number]
        if isinstance(default, tuple | list):
            values = [[number, *default[1:]], [*default[:-1], number]]
        for value in values:
            with pytest.raises(ConfigError) as error:
                check_bounds(changed(settings, key, value))
            assert str(error.value) == f"{key}={number} must be {bounds}"
    if bounds.order != "any":
        for value in ([0.9, 0.5], [0.5, 0.5])[: 2 if bounds.order == "strictly rising" else 1]:
            with pytest.raises(ConfigError) as error:
                check_bounds(changed(settings, key, value))
            assert str(error.value) == f"{key}={value} must rise"


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(1), "at least 1"),
        (Bounds(0, 0.5), "between 0 and 0.5"),
        (Bounds(above=0), "above 0"),
        (Bounds(above=0, high=1), "above 0 and at most 1"),
    ],
)
def test_words(bounds: Bounds, text: str) -> None:
    assert str(bounds) == text
    bounds.check("key", 1 if bounds.high > 0.5 else 0.5)
    bounds.check("key", None)
    with pytest.raises(ConfigError, match=rf"^key=nan must be {text}$"):
        bounds.check("key", math.nan)
