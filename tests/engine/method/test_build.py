"""Methods are found by name, and what a method refuses is refused before any data is read."""

import re
from dataclasses import replace

import pytest

from simmim.command_line import load
from simmim.errors import ConfigError
from simmim.method.build import check_config, find_method, method_class, methods
from simmim.method.simmim import SimMIMMethod
from simmim.method.simsiam import SimSiamMethod
from simmim.method.tokens import TokenMethod


def test_every_method_is_known_by_its_name() -> None:
    assert methods() == {"simmim": SimMIMMethod, "simsiam": SimSiamMethod, "tokens": TokenMethod}
    assert list(methods()) == sorted(methods())


def test_a_run_has_the_method_that_it_names() -> None:
    for recipe, wanted in (("smoke", SimMIMMethod), ("tokens_smoke", TokenMethod)):
        config = load([recipe, "--data.path=x"])
        chosen = find_method(config)
        assert type(chosen) is wanted
        assert chosen.config is config


def test_a_misspelt_method_is_told_its_neighbour_and_a_strange_one_all() -> None:
    with pytest.raises(ConfigError, match=r"method\.name=simian is unknown; did you mean sim"):
        method_class("simian")
    message = re.escape("method.name=zzz is unknown; known are simmim, simsiam, tokens")
    with pytest.raises(ConfigError, match=message):
        method_class("zzz")


def test_the_check_covers_the_run_the_method_and_idle_keys() -> None:
    config = load(["smoke", "--data.path=x"])
    check_config(config)
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        check_config(
            replace(config, train=replace(config.train, batch_size=7, accumulation_steps=2))
        )
    with pytest.raises(ConfigError, match=r"mask\.unit=12"):
        check_config(replace(config, mask=replace(config.mask, unit=12)))
