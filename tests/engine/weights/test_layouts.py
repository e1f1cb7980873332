"""Whose names a checkpoint has, and the configuration that lies in or beside it."""

import json
from pathlib import Path

import pytest
import torch

from layout_cases import make_weights
from simmim.model.weights_file import save_tensors
from simmim.weights.export import to_layout
from simmim.weights.layouts import read_config, to_ours


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("official", "swin"),
        ("mmpretrain", "swin"),
        ("timm", "swin"),
        ("hf", "swin"),
        ("timm", "plain-vit"),
        ("timm", "tuned-vit"),
        ("hf", "swinv2"),
    ],
)
def test_names_tell_the_layout_and_another_is_refused(layout: str, name: str) -> None:
    export = to_layout(
        make_weights(name, "classifier" if name == "tuned-vit" else "simmim"), layout
    )
    found, converted = to_ours(export.state, export.config)
    assert found == layout
    assert None not in converted.hints.values()
    assert to_ours(export.state, export.config, layout)[1].state.keys() == converted.state.keys()
    other = "mmpretrain" if layout != "mmpretrain" else "hf"
    with pytest.raises(ValueError, match=f"not the names of {other}; found "):
        to_ours(export.state, export.config, other)


def test_only_a_file_that_says_it_is_ours_may_have_strange_names() -> None:
    state = {"encoder.strange": torch.zeros(1)}
    assert to_ours(state, {}, is_ours=True)[0] == "simmim"
    for options in ({}, {"is_ours": True, "layout": "hf"}):
        with pytest.raises(ValueError, match="found encoder"):
            to_ours(state, {}, **options)


def test_the_file_s_notes_stand_above_the_configuration_beside_it(tmp_path: Path) -> None:
    path, beside = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_tensors({"a": torch.zeros(1)}, path, {"timm": json.dumps({"architecture": "x"})})
    beside.write_text(json.dumps({"architecture": "y"}))
    assert read_config(path) == {"architecture": "x"}
    save_tensors({"a": torch.zeros(1)}, path)
    assert read_config(path) == {"architecture": "y"}
    beside.write_text(json.dumps({"model_type": "swin"}))
    statistics = {"image_mean": [0.1], "image_std": [0.2], "size": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    assert read_config(path) == {"model_type": "swin", "image_mean": [0.1], "image_std": [0.2]}
    for text in ("[1]", "{", '{"a": 1}'):
        beside.write_text(text)
        assert read_config(path) == {}
