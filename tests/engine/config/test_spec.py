"""From [model] keys to an architecture, or to one line that says what does not fit."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from simmim.backbone.build import PRESETS
from simmim.command_line import load
from simmim.config.sections import Config, DataConfig, ModelConfig
from simmim.config.spec import make_spec, resolve_spec
from simmim.errors import ConfigError


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.window_size=5"], "model.window_size: a window of 5 tokens does not fit"),
        (
            ["--data.image_size=65"],
            "data.image_size: 65×65 px is no multiple of the encoder stride 8",
        ),
        (["--model.num_heads=[3,4]"], "model.num_heads: 3 does not divide the width 16"),
        (["--model.layer_scale=0.1"], "model.layer_scale has no meaning for swin_tiny"),
        (["--model.name=swin_bse"], "model.name=swin_bse is unknown; did you mean swin_base?"),
    ],
)
def test_what_makes_no_architecture(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SIZE = (192, 384)


def made(name: str, **given: Any) -> dict[str, Any]:
    """How a preset is changed by fields of [model]."""
    spec = make_spec(ModelConfig(name=name, **given), SIZE, 3)
    preset = replace(PRESETS[name], image_size=SIZE)
    values, before = asdict(spec), asdict(preset)
    return {key: value for key, value in values.items() if value != before[key]}


@pytest.mark.parametrize(
    ("name", "given", "changed"),
    [
        ("swin_tiny", {}, {}),
        ("swin_tiny", {"drop_path": 0.25}, {"drop_path": 0.25}),
        ("swin_tiny", {"depths": [1, 1], "num_heads": [2, 4]},
         {"depths": (1, 1), "num_heads": (2, 4)}),
        ("swin_tiny", {"window_size": 3}, {"window_size": 3}),
        ("swin_tiny", {"patch_size": 2, "embed_dim": 192}, {"patch_size": 2, "embed_dim": 192}),
        ("swin_tiny", {"mlp_ratio": 2.5, "qk_scale": 0.5}, {"mlp_ratio": 2.5, "qk_scale": 0.5}),
        ("swin_tiny", {"absolute_position": True}, {"absolute_position": True}),
        ("swin_tiny", {"qkv_bias": False}, {"qkv_bias": False}),
        ("vit_tiny", {"depths": [3], "num_heads": [6]}, {"depth": 3, "num_heads": 6}),
        ("vit_tiny", {"layer_scale": 0.5}, {"layer_scale": 0.5}),
        ("vit_tiny", {"layer_scale": 0.0}, {"layer_scale": None}),
        ("vit_tiny", {"final_norm": False}, {"final_norm": False}),
        ("vit_tiny", {"shared_relative_position": False, "class_token": False},
         {"shared_relative_position": False, "class_token": False}),
        ("vit_tiny", {"absolute_position": True, "frozen_position": True},
         {"absolute_position": True, "frozen_position": True}),
        ("resnet50", {"drop_path": 0.5}, {"drop_path": 0.5}),
    ],
)  # fmt: skip
def test_every_field_of_model_arrives(
    name: str, given: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert made(name, **given) == changed


def test_size_and_channels_are_those_of_the_data() -> None:
    config = Config(
        model=ModelConfig(name="vit_tiny"), data=DataConfig(image_size=SIZE, channels=5)
    )
    for spec in (resolve_spec(config), make_spec(config.model, SIZE, 5)):
        assert spec == replace(PRESETS["vit_tiny"], image_size=SIZE, channels=5, drop_path=0.0)


def test_a_given_preset_comes_before_the_name() -> None:
    given = replace(PRESETS["vit_tiny"], depth=2, drop_path=0.5)
    spec = make_spec(ModelConfig(name="swin_base", mlp_ratio=2.0), SIZE, 3, given)
    assert spec == replace(given, image_size=SIZE, channels=3, mlp_ratio=2.0, drop_path=0.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(name="vit_tiny", depths=[2, 2]),
         "model.depths=[2, 2]: vit_tiny takes one number, such as [12]"),
        (ModelConfig(name="vit_tiny", num_heads=[]),
         "model.num_heads=[]: vit_tiny takes one number, such as [12]"),
        (ModelConfig(name="swin_tiny", depths=[], num_heads=[]),
         "model.depths=() must be the number of blocks of every stage"),
        (ModelConfig(name="vit_tiny", window_size=7),
         "model.window_size has no meaning for vit_tiny; leave it out"),
        (ModelConfig(name="resnet50", num_heads=[2]),
         "model.num_heads has no meaning for resnet50; leave it out"),
    ],
)  # fmt: skip
def test_one_line_for_fields_of_another_family(model: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_spec(model, SIZE, 3)
    assert str(error.value) == message


def test_a_preset_without_a_name_is_told_by_its_family() -> None:
    with pytest.raises(ConfigError, match=r"^model\.window_size has no meaning for a vit; leave"):
        make_spec(ModelConfig(name="", window_size=7), SIZE, 3, PRESETS["vit_tiny"])
