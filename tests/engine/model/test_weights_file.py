"""Weights files of any program: read without running code in them, clear words for damaged ones."""

import json
import os
import pickle
import stat
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simmim
from simmim import load_model
from simmim.backbone.build import spec_to_dict
from simmim.backbone.vit import ViTSpec
from simmim.config.sections import MaskConfig
from simmim.method.tokens import TokenSimMIM
from simmim.model.classifier import Classifier
from simmim.model.weights_file import (
    best_weights,
    find_weights,
    model_metadata,
    plain_metadata,
    read_notes,
    read_weights,
    save_tensors,
    save_weights,
    trained_mask,
    unwrap,
)
from simmim.run_folder import RunFolder


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for yacs.config.CfgNode, pickled under its name as official files hold it."""

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, init: dict | None = None) -> None:
            super().__init__(init or {})
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


def same(model: simmim.SimMIM, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_official_checkpoint_with_its_configuration(
    official: dict[str, Tensor], yacs: Any, tmp_path: Path, zipped: bool, monkeypatch: Any
) -> None:
    content = {
        "model": official,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "lr_scheduler": {"base_values": [1e-4]},
        "max_accuracy": 0.0,
        "epoch": 99,
        "config": yacs({"MODEL": yacs({"NAME": "x", "DEPTHS": [2, 2]}), "AMP": "O1"}),
    }
    path = tmp_path / "ckpt_epoch_99.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")  # the reader has no yacs
    monkeypatch.delitem(sys.modules, "yacs")
    assert same(load_model(path), official)
    assert same(load_model(str(path), image_size=64), official)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused(
    official: dict[str, Tensor], tmp_path: Path, writer: str
) -> None:
    mark, path = tmp_path / "it_ran", tmp_path / "hostile.pth"
    content = {"model": official, "config": Bomb(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"config": Bomb(mark)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match=r"hostile\.pth: refused") as error:
        load_model(path)
    assert not mark.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "empty.pth"),
        (b"junk" * 100, "junk.pth"),
        (b"\x80\x02.", "cut.pth"),
        (b"x", "x.safetensors"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_model(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_model(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="holds neither"):
        load_model(tmp_path)


SPEC = ViTSpec((16, 16), patch_size=8, embed_dim=8, depth=1, num_heads=2)


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"note": "x"})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert read_notes(tmp_path / "a.safetensors") == {"note": "x"}


def test_the_file_says_how_to_rebuild_the_model_and_its_mask(tmp_path: Path) -> None:
    model = simmim.SimMIM(SPEC.build(), norm_target=5, mean=[0.5] * 3, std=[0.25] * 3)
    path = tmp_path / "model.safetensors"
    save_weights(model, path, MaskConfig(unit=16, ratio=0.3))
    metadata = read_weights(path)[1]
    assert metadata == {
        "kind": "simmim",
        "encoder": json.loads(json.dumps(spec_to_dict(SPEC))),
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "mask": {"unit": 16, "ratio": 0.3},
        "norm_target": 5,
    }
    assert trained_mask(path) == {"unit": 16, "ratio": 0.3}
    save_weights(model, path)
    assert trained_mask(path) == {"unit": 32, "ratio": 0.6}  # the paper's


def test_settings_of_newer_kinds_stand_in_a_table_of_their_own() -> None:
    plain = replace(SPEC, absolute_position=True, shared_relative_position=False)
    model = TokenSimMIM(plain.build(), loss="l2")
    metadata = json.loads(model_metadata(model, {"unit": 32, "ratio": 0.5})["simmim"])
    assert metadata["settings"] == model.settings
    assert metadata["mask"] == {"unit": 8, "ratio": 0.5}
    assert "loss" not in metadata
    bare = json.loads(model_metadata(Classifier(SPEC.build(), ["a"]))["simmim"])
    assert (bare["classes"], bare["margin"]) == (["a"], None)
    assert "mask" not in bare


def test_weights_keep_their_type_and_are_whole_tensors(tmp_path: Path) -> None:
    model = simmim.SimMIM(SPEC.build()).half()
    save_weights(model, tmp_path / "model.safetensors")
    state, _ = read_weights(tmp_path / "model.safetensors")
    assert same(model, state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def checkpoint(run: Path, step: int, tensor: Tensor, *, whole: bool = True) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    save_tensors({"a": tensor}, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    state = {"files": {"model.safetensors": {"bytes": size if whole else size + 1}}}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_run_s_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    first, second = (checkpoint(tmp_path, s, torch.full((1,), s)) for s in (9, 10))
    assert find_weights(tmp_path) == second / "model.safetensors"
    checkpoint(tmp_path, 11, torch.zeros(1), whole=False)
    assert find_weights(tmp_path) == second / "model.safetensors"
    assert find_weights(first) == first / "model.safetensors"


def test_weights_in_several_files_are_joined_and_none_may_be_missing(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "1.safetensors", "b": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    save_tensors({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=r"2\.safetensors: missing, model.* names it"):
        read_weights(tmp_path)
    save_tensors({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    assert read_weights(tmp_path)[0].keys() == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "../1.safetensors"}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        read_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a readable list"):
        read_weights(tmp_path)


def test_wrappers_and_prefixes_of_training_programs_are_taken_off() -> None:
    tensor = torch.ones(1)
    for content in ({"model": {"a": tensor}}, {"state_dict": {"a": tensor}}, {"module.a": tensor}):
        assert unwrap(content) == {"a": tensor}
    with pytest.raises(ValueError, match="no tensors among the keys epoch, 3"):
        unwrap({"epoch": 1, 3: 4})


@pytest.mark.parametrize("text", [None, "[1]", "{", '{"kind": "simmim"}', '{"encoder": 3}'])
def test_notes_of_another_program_tell_nothing(text: str | None) -> None:
    assert plain_metadata(text) == {}


def test_the_best_weights_of_a_fine_tuning_run_are_its_best_folder_s(tmp_path: Path) -> None:
    assert best_weights(tmp_path) == tmp_path
    best = RunFolder(tmp_path).best_weights
    best.parent.mkdir(parents=True, exist_ok=True)
    best.write_bytes(b"x")
    assert best_weights(tmp_path) == best
