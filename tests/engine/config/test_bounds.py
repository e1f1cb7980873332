"""The bounds of settings: they stand on fields, and values beyond them are refused."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from config_keys import bounds_of
from simmim.config.bounds import Bounds, bounded, check_bounds
from simmim.config.finetune import FinetuneConfig
from simmim.config.values import config_class, leaves
from simmim.errors import ConfigError
from simmim.method.build import methods

CLASSES = {name: config_class(method.Settings) for name, method in methods().items()}
CLASSES["finetuning"] = FinetuneConfig  # type: ignore[assignment]


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


def test_both_ends_are_within() -> None:
    bounds = Bounds(1, 3)
    for number in (1, 2, 3, [1, 3], (3, 1), None, [None, 2]):
        bounds.check("key", number)
    for number in (0.999, 3.001, [2, 0], (4, 2)):
        with pytest.raises(ConfigError, match=r"^key=[\d.]+ must be between 1 and 3$"):
            bounds.check("key", number)
    Bounds(above=1, high=3).check("key", 3)
    with pytest.raises(ConfigError, match=r"^key=1 must be above 1 and at most 3$"):
        Bounds(above=1, high=3).check("key", 1)


@pytest.mark.parametrize(
    ("order", "allowed", "refused"),
    [
        ("any", [[2, 1], [1, 1], [1, 3, 2]], []),
        ("rising", [[1, 2], [1, 1], [1], None], [[2, 1], [1, 3, 2]]),
        ("strictly rising", [[1, 2], [1], None], [[2, 1], [1, 1], [1, 2, 2]]),
    ],
)
def test_orders(order: Any, allowed: list[Any], refused: list[Any]) -> None:
    bounds = Bounds(order=order)
    for numbers in allowed:
        bounds.check("key", numbers)
    for numbers in refused:
        with pytest.raises(ConfigError) as error:
            bounds.check("key", tuple(numbers))
        assert str(error.value) == f"key={numbers} must rise"


def test_a_field_keeps_the_bounds_that_it_was_given() -> None:
    @dataclass
    class Inner:
        a: int = bounded(3, low=1, high=4)
        b: float = bounded(0.5, above=0, high=1)
        c: tuple[int, int] = bounded((1, 2), order="rising")
        free: int = -9

    @dataclass
    class Outer:
        inner: Inner = field(default_factory=Inner)
        d: int | None = bounded(None, low=0)

    assert (Inner().a, Inner().b, Inner().c, Outer().d) == (3, 0.5, (1, 2), None)
    assert dict(bounds_of(Outer())) == {
        "inner.a": Bounds(1, 4),
        "inner.b": Bounds(above=0, high=1),
        "inner.c": Bounds(order="rising"),
        "d": Bounds(0),
    }
    check_bounds(Outer())
    for wrong, message in (
        (Outer(Inner(a=5)), "inner.a=5 must be between 1 and 4"),
        (Outer(Inner(c=(2, 1))), "inner.c=[2, 1] must rise"),
        (Outer(d=-1), "d=-1 must be at least 0"),
        (Outer(Inner(b=0), d=-1), "inner.b=0 must be above 0 and at most 1"),
    ):
        with pytest.raises(ConfigError) as error:
            check_bounds(wrong)
        assert str(error.value) == message
