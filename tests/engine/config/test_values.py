"""Configurations as keys, plain values and TOML."""

from dataclasses import asdict
from pathlib import Path

from simmim.command_line import load
from simmim.config.sections import Config
from simmim.config.values import from_dict, leaf_types, leaves, to_toml


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


def test_round_trip_through_toml(tmp_path: Path) -> None:
    config = parse("--data.image_size=[64,128]", "--output=run", "--kernels.backend=native")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load([str(tmp_path / "config.toml")]) == config
    assert from_dict(asdict(config), type(config)) == config
    assert leaves(config).keys() == leaf_types(type(config)).keys()
