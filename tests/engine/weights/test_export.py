"""Exports: refused where no model of the target computes the same, read back bit for bit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layout_cases import (
    ALL,
    CASES,
    PLAIN_VIT,
    SPECS,
    SWIN,
    assert_same,
    differing_fields,
    make_weights,
    reason_against,
)
from simmim.backbone.build import build_encoder
from simmim.method.simmim import SimMIM
from simmim.method.simsiam import SimSiam
from simmim.model.weights_file import read_notes
from simmim.weights.export import strange_files, to_layout, write
from simmim.weights.load import Weights, read_model
from simmim.weights.proof import prove


@pytest.mark.parametrize(("layout", "name", "kind"), [case for case in ALL if case not in CASES])
def test_what_no_model_computes_is_refused(layout: str, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=reason_against(layout, name, kind)):
        to_layout(make_weights(name, kind), layout)


@pytest.mark.parametrize(("layout", "name", "kind"), CASES)
def test_files_come_back_bit_for_bit(layout: str, name: str, kind: str, tmp_path: Path) -> None:
    weights = make_weights(name, kind)
    export = to_layout(weights, layout)
    path = tmp_path / ("out" if layout == "hf" else "out.safetensors")
    write(export, path, weights.metadata)
    back = read_model(path)
    assert_same(weights, back, export)
    assert back.spec == weights.spec
    assert back.layout == layout or (layout, back.layout) == ("official", "simmim")
    if back.kind == "classifier":
        assert list(back.metadata["classes"]) == ["cat", "dog", "emu"]
    # and once more
    again = to_layout(back, layout)
    assert again.state.keys() == export.state.keys()
    assert all(torch.equal(again.state[key], export.state[key]) for key in export.state)


@pytest.mark.parametrize(("layout", "name", "kind"), CASES)
def test_bare_tensors_come_back_bit_for_bit(
    layout: str, name: str, kind: str, tmp_path: Path
) -> None:
    weights = make_weights(name, kind)
    export = to_layout(weights, layout)
    if layout == "hf":
        write(export, tmp_path / "hf", weights.metadata)
        save_file(export.state, tmp_path / "hf" / "model.safetensors")  # no metadata of ours
        back = read_model(tmp_path / "hf")
        assert differing_fields(weights.spec, back.spec) <= {"layer_scale"}
    else:
        write(export, tmp_path / "out.pth", weights.metadata)
        window = getattr(SPECS[name], "window_size", None)
        size = SPECS[name].image_size
        back = read_model(tmp_path / "out.pth", size, num_heads=2, window_size=window)
    if (layout, kind) == ("timm", "classifier") and name in ("vit", "plain-vit"):
        # nothing tells that the tokens are averaged: theirs may read the class token
        assert back.kind == "encoder"
        assert back.metadata["dropped"] == ["head.weight", "head.bias"]
        return
    assert_same(weights, back, export)


def test_clamped_windows_are_refused_where_the_other_side_has_none() -> None:
    spec = replace(
        SWIN, image_size=(64, 64), window_size=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )
    model = SimMIM(build_encoder(spec))
    weights = Weights("x", "simmim", "simmim", dict(model.state_dict()), spec, {})
    with pytest.raises(ValueError, match="one window for all stages, 4"):
        to_layout(weights, "hf")
    export = to_layout(weights, "mmpretrain")
    stages = export.config["backbone"]["stage_cfgs"]
    assert [stage["window_size"] for stage in stages] == [4, 4, 4, 2]
    prove(weights, export)
    prove(weights, to_layout(weights, "timm"))


def test_norms_of_another_epsilon_are_refused() -> None:
    weights = make_weights("plain-vit", "encoder")
    other = replace(weights, spec=replace(PLAIN_VIT, norm_eps=1e-12))
    with pytest.raises(ValueError, match="timm's norms have an epsilon of 1e-06, these 1e-12"):
        to_layout(other, "timm")
    assert to_layout(other, "hf").config["layer_norm_eps"] == 1e-12


def test_heads_that_nobody_else_knows_are_named_as_left_out() -> None:
    model = SimSiam(build_encoder(SWIN), projector_width=8, predictor_width=4)
    weights = Weights("x", "simmim", "simsiam", dict(model.state_dict()), SWIN, {})
    export = to_layout(weights, "timm")
    heads = {name for name in weights.state if not name.startswith("encoder.")}
    assert heads
    assert set(export.left_out) == heads
    assert export.kind == "encoder"


def test_a_folder_that_cannot_be_replaced_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_weights("swin", "simmim")
    export = to_layout(weights, "hf")
    write(export, tmp_path / "out", {})
    replaced = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "out":
            raise OSError("full")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write(export, tmp_path / "out", {})
    assert [len(list(folder.iterdir())) for folder in tmp_path.iterdir()] == [3]


def test_files_say_what_they_are_and_wrap_their_tensors_as_expected(tmp_path: Path) -> None:
    weights = make_weights("swin", "classifier")
    for layout, wrapper in (("official", "model"), ("mmpretrain", "state_dict"), ("timm", None)):
        export = to_layout(weights, layout)
        write(export, tmp_path / "a.pth", {})
        content = torch.load(tmp_path / "a.pth", weights_only=True)
        assert (content if wrapper is None else content[wrapper]).keys() == export.state.keys()
        write(export, tmp_path / "a.safetensors", {"mean": [0.1, 0.2, 0.3]})
        notes = read_notes(tmp_path / "a.safetensors")
        assert json.loads(notes["simmim"])["mean"] == [0.1, 0.2, 0.3]
        assert json.loads(notes.get(layout, "{}")) == export.config
    (tmp_path / "strange.txt").touch()
    assert strange_files(tmp_path) == ["a.pth", "a.safetensors", "strange.txt"]
