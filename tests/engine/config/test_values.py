"""Configurations as keys, plain values and TOML."""

import tomllib
from dataclasses import FrozenInstanceError, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.command_line import load
from simmim.config.finetune import FinetuneConfig
from simmim.config.sections import Config, MethodConfig, RunConfig
from simmim.config.values import (
    config_class,
    flatten,
    from_dict,
    leaf_types,
    leaves,
    nearest,
    to_toml,
)
from simmim.method.build import methods


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


def test_round_trip_through_toml(tmp_path: Path) -> None:
    config = parse("--data.image_size=[64,128]", "--output=run", "--kernels.backend=native")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load([str(tmp_path / "config.toml")]) == config
    assert from_dict(asdict(config), type(config)) == config
    assert leaves(config).keys() == leaf_types(type(config)).keys()


CLASSES: list[type[RunConfig]] = [config_class(method.Settings) for method in methods().values()]
CLASSES.append(FinetuneConfig)


@dataclass(frozen=True, kw_only=True)
class OwnSettings(MethodConfig):
    """A method's."""

    strength: float = 0.5


def test_a_method_has_a_class_of_its_own() -> None:
    cls = config_class(OwnSettings)
    assert issubclass(cls, Config)
    assert config_class(OwnSettings) is cls  # two configurations of one method can be compared
    assert config_class(MethodConfig) is Config
    assert cls().method == OwnSettings()
    assert cls(method=OwnSettings(strength=2)).method.strength == 2  # type: ignore[attr-defined]
    assert leaf_types(cls)["method.strength"] is float
    assert {f.name for f in fields(cls)} == {f.name for f in fields(Config)}
    assert (cls.__name__, cls.__doc__) == ("Config", Config.__doc__)
    with pytest.raises(FrozenInstanceError):
        cls().seed = 3  # type: ignore[misc]


def test_keys_and_types() -> None:
    types = leaf_types(Config)
    assert types["seed"] is int
    assert types["train.steps"] is int
    assert types["data.image_size"] == int | tuple[int, int]
    assert types["optim.name"] == Literal["adamw", "sgd"]
    assert not any(key in types for key in ("train", "data", "method"))
    assert leaf_types() == types


def test_nested_values_become_keys_in_order() -> None:
    nested = {"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}}
    assert list(flatten(nested)) == [("a", 1), ("b.c", [2]), ("b.d.e", None)]
    assert list(flatten({"x": 1}, "p.")) == [("p.x", 1)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train.stps", "did you mean train.steps?"),
        ("steps", "did you mean train.steps?"),
        ("data.lr", "did you mean optim.lr?"),
        ("schedule.warmup_lrs", "did you mean schedule.warmup_lr?"),
        ("zzzzzz", "known are train.steps, optim.lr, schedule.warmup_lr"),
    ],
)
def test_the_nearest_name(name: str, told: str) -> None:
    assert nearest(name, ["train.steps", "optim.lr", "schedule.warmup_lr"]) == told


def test_toml_has_every_key_that_is_set() -> None:
    text = to_toml(Config(output='runs/"é"', seed=3))
    lines = text.splitlines()
    assert lines[:3] == ["seed = 3", 'output = "runs/\\"é\\""', 'device = "auto"']
    assert text.endswith("\n")
    assert "\n\n[mask]\nunit = 32\nratio = 0.6\n" in text
    values = dict(flatten(tomllib.loads(text)))
    unset = {key for key, value in leaves(Config()).items() if value is None}
    assert unset
    assert values.keys() == leaves(Config()).keys() - unset
    assert (values["data.crop_scale"], values["log.tensorboard"]) == ([0.67, 1.0], False)


def test_lists_become_tuples_only_where_the_type_says_so() -> None:
    config = from_dict(
        {"data": {"image_size": [64, 96], "mean": [0.5], "crop_scale": [0.5, 1]}, "seed": 3}, Config
    )
    assert config.data.image_size == (64, 96)
    assert config.data.crop_scale == (0.5, 1)
    assert config.data.mean == [0.5]
    assert (config.seed, config.data.flip) == (3, 0.5)
    assert from_dict({"model": {"depths": [1]}}, Config).model.depths == [1]


def values_of(kind: Any, default: Any) -> st.SearchStrategy[Any]:
    """Values of a key's type."""
    text = str(kind)
    if "Literal" in text:
        return st.just(default)
    number = st.floats(-1e6, 1e6) if "float" in text else st.integers(-(2**60), 2**60)
    if kind is bool or kind == bool | None:
        return st.booleans()
    if kind is str:
        return st.text()
    if "tuple" in text:
        return st.tuples(number, number)
    if "list" in text:
        return st.lists(number)
    return number


@pytest.mark.parametrize("cls", CLASSES)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_what_is_written_is_what_is_read(cls: type[RunConfig], data: Any) -> None:
    """Any value of any key comes back from TOML, and from plain values."""
    types, defaults = leaf_types(cls), leaves(cls())
    keys = data.draw(st.lists(st.sampled_from(sorted(types)), unique=True, max_size=8))
    nested: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        place = nested.setdefault(section, {}) if section else nested
        place[name] = data.draw(values_of(types[key], defaults[key]), label=key)
    config = from_dict(nested, cls)
    assert {key: leaves(config)[key] for key in keys} == dict(flatten(nested))
    assert from_dict(asdict(config), cls) == config
    assert from_dict(tomllib.loads(to_toml(config)), cls) == config
