"""`simmim reconstruct`: every flag arrives; the mask is that of the training where none is said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recorded_calls import record
from simmim.commands import reconstruct as command


class Masked:
    """Stands for a model that masks images."""


class Recorded:
    """The command with everything that it calls recorded."""

    def __init__(self, patch: pytest.MonkeyPatch, model: Any = None) -> None:
        patch.setattr(command, "MaskedImageModel", Masked)
        self.model = model or Masked()
        self.loaded = record(patch, command, "load_model", lambda **given: self.model)
        self.masks = record(
            patch, command, "trained_mask", lambda **given: {"unit": 16, "ratio": 0.75}
        )
        self.drawn = record(patch, command, "reconstruct_files", lambda **given: "picture")
        self.saved = record(patch, command, "save_picture")


@pytest.mark.parametrize(
    ("flags", "size", "options"),
    [
        ([], None, {}),
        (["--mask-unit=8", "--image-size=96"], 96, {"mask_unit": 8}),
        (["--mask-ratio=0.5", "--seed=3"], None, {"ratio": 0.5, "seed": 3}),
        (["--mask-ratio=0", "--value-range", "1", "2"], None,
         {"ratio": 0.0, "value_range": (1.0, 2.0)}),
    ],
)  # fmt: skip
def test_every_flag_arrives(
    flags: list[str],
    size: int | None,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called, out = Recorded(monkeypatch), tmp_path / "out.png"
    assert command.main(["run", "a.png", "b.png", f"--output={out}", *flags]) == 0
    assert [[*call.values()] for call in called.loaded] == [["run", size]]
    assert called.masks == [{"path": "run"}]
    default = {"mask_unit": 16, "ratio": 0.75, "seed": 0, "value_range": None}
    files = [Path("a.png"), Path("b.png")]
    assert called.drawn == [{"model": called.model, "files": files} | default | options]
    assert [[*call.values()] for call in called.saved] == [["picture", out]]
    assert capsys.readouterr().out == f"{out}\n"


def test_a_picture_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reconstruction.png").write_text("mine")  # the default
    assert command.main(["run", "a.png"]) == 2
    assert "reconstruction.png exists; choose another --output" in capsys.readouterr().err
    assert called.loaded == []
    assert command.main(["run", "a.png", "--overwrite"]) == 0
    assert len(called.saved) == 1


def test_a_model_that_masks_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch, SimpleNamespace(kind="classifier"))
    assert command.main(["run", "a.png", f"--output={tmp_path / 'a.png'}"]) == 2
    assert "run: a classifier reconstructs nothing" in capsys.readouterr().err
    assert called.drawn == []
