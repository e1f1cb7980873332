"""`simmim features`: every flag arrives, and no file is replaced unasked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recorded_calls import Bar, record
from simmim.commands import features as command
from simmim.errors import DataError


class Recorded(Bar):
    """The command with everything that it calls recorded."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 3, layers: int = 1) -> None:
        super().__init__()
        self.moved: list[torch.device] = []
        self.model = SimpleNamespace(to=self._move)
        self.source = SimpleNamespace(names=["a", "b", "c"])
        self.layers = [f"block {n}" for n in range(1, layers + 1)]
        world = SimpleNamespace(device=torch.device("meta"))
        self.worlds = record(patch, command, "pick_world", lambda **given: world)
        self.opened = record(patch, command, "open_source", lambda **given: self.source)
        self.labelled = record(patch, command, "labels_of", lambda **given: "labels")
        self.loaded = record(patch, command, "load_for_features", lambda **given: self.model)
        self.picked = record(patch, command, "pick_layers", lambda **given: self.layers)
        self.views = record(patch, command, "evaluation_view", lambda **given: "view")
        self.bars = record(patch, command, "progress", lambda **given: self)
        self.calls = record(patch, command, "write_features", lambda **given: self._run(given))
        self.count = count

    def _move(self, device: torch.device) -> Any:
        self.moved.append(device)
        return self.model

    def _run(self, given: dict[str, Any]) -> int:
        given["report"]("c: broken")
        given["advance"](2)
        return self.count


def test_defaults_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called, out = Recorded(monkeypatch), tmp_path / "out.npy"
    assert command.main(["run", "photos", str(out)]) == 0
    assert called.worlds == [{"device": "auto"}]
    assert called.opened == [{"path": "photos"}]
    assert called.labelled == [
        {"source": called.source, "label_file": None, "class_file": None, "first_number": None,
         "partial": True}
    ]  # fmt: skip
    assert called.loaded == [{"path": "run", "image_size": None}]
    assert called.picked == [{"model": called.model, "text": "output"}]
    assert called.views == [{"model": called.model, "margin": None, "value_range": None}]
    assert called.bars == [{"what": "encoded", "total": 3}]
    assert called.advanced == [(5, 2)]
    for call in called.calls:
        del call["report"], call["advance"]
    assert called.calls == [
        {
            "path": out,
            "model": called.model,
            "source": called.source,
            "labels": "labels",
            "dtype": "float32",
            "layers": ["block 1"],
            "pool": "mean",
            "batch_size": 64,
            "view": "view",
            "workers": -1,
            "precision": "float32",
        }
    ]
    captured = capsys.readouterr()
    assert captured.err == "simmim: c: broken\n"
    assert captured.out == f"{out}: block 1 of 3 images\n"


def test_every_flag_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called, out = Recorded(monkeypatch, count=1, layers=2), tmp_path / "out.safetensors"
    flags = ["--layer=1,2", "--pool=none", "--dtype=float16", "--image-size", "96", "64",
             "--margin=1.5", "--labels=l.csv", "--classes=c.txt", "--first-number=1",
             "--workers=2", "--value-range", "1", "2", "--device=cpu", "--precision=fp16",
             "--batch-size=9"]  # fmt: skip
    assert command.main(["run", "photos", str(out), *flags]) == 0
    assert called.worlds == [{"device": "cpu"}]
    assert called.moved == [torch.device("meta")]
    assert called.labelled[0]["label_file"] == Path("l.csv")
    assert called.labelled[0]["class_file"] == Path("c.txt")
    assert called.labelled[0]["first_number"] == 1
    assert called.loaded == [{"path": "run", "image_size": [96, 64]}]
    assert called.picked == [{"model": called.model, "text": "1,2"}]
    assert called.views == [{"model": called.model, "margin": 1.5, "value_range": (1.0, 2.0)}]
    (call,) = called.calls
    del call["report"], call["advance"]
    assert call == {
        "path": out,
        "model": called.model,
        "source": called.source,
        "labels": "labels",
        "dtype": "float16",
        "layers": ["block 1", "block 2"],
        "pool": "none",
        "batch_size": 9,
        "view": "view",
        "workers": 2,
        "precision": "fp16",
    }
    assert capsys.readouterr().out == f"{out}: 2 layers of 1 images, 2 left out\n"


@pytest.mark.parametrize("name", ["out.npy", "out.csv", "out.npy.csv"])
def test_no_file_is_replaced_unasked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called, out = Recorded(monkeypatch), tmp_path / "out.npy"
    there = tmp_path / name
    there.write_text("")
    mine = there in command.feature_files(out)
    assert command.main(["run", "photos", str(out)]) == (2 if mine else 0)
    assert (f"{there} exists; choose another OUT" in capsys.readouterr().err) is mine
    assert len(called.calls) == int(not mine)
    assert command.main(["run", "photos", str(out), "--overwrite"]) == 0


def test_data_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**given: Any) -> None:
        raise DataError("no image can be read")

    Recorded(monkeypatch)
    record(monkeypatch, command, "write_features", broken)
    assert command.main(["run", "photos", str(tmp_path / "out.npy")]) == 2
    assert capsys.readouterr().err == "simmim: error: photos: no image can be read\n"
