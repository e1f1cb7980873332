"""Weights files of any program: read without running code in them, clear words for damaged ones."""

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simmim
from simmim import load_model


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
