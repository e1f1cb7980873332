"""A configuration survives its file, whatever its values are."""

import math
import tempfile
import tomllib
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.command_line import load
from simmim.config.bounds import Bounds, check_bounds
from simmim.config.check import micro_batch
from simmim.config.finetune import FinetuneConfig
from simmim.config.sections import Config, TrainConfig
from simmim.config.values import config_class, from_dict, leaf_types, leaves, to_toml
from simmim.errors import ConfigError
from simmim.method.build import methods

CLASSES = [FinetuneConfig, *(config_class(method.Settings) for method in methods().values())]

# Paths of any language, quotes, backslashes and control characters.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(allow_nan=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type, in its bounds or not."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    plain = {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: TEXTS}
    return {**plain, type(None): st.none()}[hint]


def configs_of(cls: type) -> st.SearchStrategy[Any]:
    """Any configuration, a few of whose keys have other values than their defaults."""
    hints = typing.get_type_hints(cls)
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            drawn[f.name] = configs_of(hints[f.name])
        else:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            drawn[f.name] = st.one_of(st.just(default), values_of(hints[f.name]))
    return st.builds(cls, **drawn)


@given(config=st.one_of(*map(configs_of, CLASSES)))
def test_any_configuration_is_read_back_from_its_file(config: Any) -> None:
    written = to_toml(config).encode()
    assert from_dict(tomllib.loads(written.decode()), type(config)) == config
    assert from_dict(asdict(config), type(config)) == config
    assert leaves(config).keys() == leaf_types(type(config)).keys()


STEPS = st.integers(1, 10**9)
SHARES = st.floats(0.001, 0.999)
# Keys that fit each other whatever they are.
FREE: dict[str, st.SearchStrategy[Any]] = {
    "seed": INTEGERS,
    "output": TEXTS.map(lambda text: f"runs/{text.strip()}x"),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "data.flip": SHARES,
    "data.crop_scale": st.tuples(SHARES, SHARES).map(sorted),
    "data.workers": st.integers(-1, 1024),
    "data.image_size": st.sampled_from([64, [64, 128], [128, 64]]),
    "mask.ratio": SHARES,
    "train.epochs": st.floats(0.01, 1e6),
    "train.steps": STEPS,
    "train.clip_norm": st.one_of(st.floats(0, 1e30), st.just(math.inf)),
    "train.channels_last": st.booleans(),
    "train.precision": st.sampled_from(["float32", "bf16", "fp16"]),
    "optim.betas": st.tuples(SHARES, SHARES).map(list),
    "optim.eps": st.floats(1e-30, 1),
    "optim.lr": st.floats(1e-30, 10),
    "schedule.gamma": SHARES,
    "checkpoint.keep_last": STEPS,
    "checkpoint.keep_every_steps": STEPS,
    "kernels.backend": st.sampled_from(["native", "reference"]),
    "log.tensorboard": st.booleans(),
}


def flag(key: str, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"--{key}={'.inf' if value == math.inf else text}"


@settings(max_examples=settings.default.max_examples // 25)
@given(
    chosen=st.lists(st.sampled_from(sorted(FREE)), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_flags_are_the_same_as_keys_of_the_file_that_a_run_keeps(
    chosen: list[str], data: st.DataObject
) -> None:
    values = {key: data.draw(FREE[key], label=key) for key in chosen}
    config = load(["smoke", "--data.path=p", *(flag(key, value) for key, value in values.items())])
    found = leaves(config)
    for key, value in values.items():
        assert found[key] == (tuple(value) if isinstance(found[key], tuple) else value), key
    untouched = leaves(load(["smoke", "--data.path=p"]))
    others = untouched.keys() - values.keys()
    assert {key: found[key] for key in others} == {key: untouched[key] for key in others}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_bytes(to_toml(config).encode())
        assert load([str(path)]) == config


def bounded_keys(cls: type, prefix: str = "") -> dict[str, Bounds]:
    hints, found = typing.get_type_hints(cls), {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            found |= bounded_keys(hints[f.name], f"{prefix}{f.name}.")
        elif "bounds" in f.metadata:
            found[prefix + f.name] = f.metadata["bounds"]
    return found


def with_value(config: Any, key: str, value: Any) -> Any:
    section, _, rest = key.partition(".")
    inner = with_value(getattr(config, section), rest, value) if rest else value
    return replace(config, **{section: inner})


@given(
    case=st.sampled_from([(c, k, b) for c in CLASSES for k, b in bounded_keys(c).items()]),
    data=st.data(),
)
def test_every_bound_is_kept_and_no_tighter(
    case: tuple[type, str, Bounds], data: st.DataObject
) -> None:
    cls, key, bounds = case
    number = data.draw(st.floats(allow_nan=False) | st.sampled_from([bounds.low, bounds.high]))
    inside = bounds.low <= number <= bounds.high
    if bounds.above is not None:
        inside = inside and number > bounds.above
    config = with_value(cls(), key, [number])
    if inside:
        check_bounds(config)
    else:
        with pytest.raises(ConfigError, match=f"^{key}="):
            check_bounds(config)


@given(
    key=st.sampled_from([k for k, b in bounded_keys(Config).items() if b.order != "any"]),
    data=st.data(),
)
def test_pairs_that_must_rise_rise(key: str, data: st.DataObject) -> None:
    bounds = bounded_keys(Config)[key]
    numbers = st.sampled_from([0.25, 0.5, 1.0])
    first, second = data.draw(numbers), data.draw(numbers)
    config = with_value(Config(), key, (first, second))
    rises = first < second if bounds.order == "strictly rising" else first <= second
    if rises:
        check_bounds(config)
    else:
        with pytest.raises(ConfigError, match=f"^{key}=.*must rise"):
            check_bounds(config)


@given(size=st.integers(1, 10**6), accumulation=st.integers(1, 20), world=st.integers(1, 64))
def test_a_batch_is_split_evenly_or_the_nearest_that_can_be_is_named(
    size: int, accumulation: int, world: int
) -> None:
    train = TrainConfig(batch_size=size, accumulation_steps=accumulation)
    parts = accumulation * world
    try:
        assert micro_batch(Config(train=train), world) * parts == size
    except ConfigError as error:
        near = int(str(error).rpartition(" ")[2])
        assert size % parts != 0
        assert near >= parts
        assert near % parts == 0
        assert abs(near - size) <= max(parts / 2, parts - size)
        assert micro_batch(Config(train=replace(train, batch_size=near)), world)
