"""Folders to share: every fact that is given arrives in its file, and what exists is kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recorded_calls import record
from simmim.backbone.build import build_encoder
from simmim.backbone.vit import ViTSpec
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.weights_file import trained_mask
from simmim.sharing import model_folder as module
from simmim.sharing.card import describe
from simmim.sharing.model_folder import FILES, check_output, export, save_pretrained

SPEC = ViTSpec(image_size=(32, 32), patch_size=16, embed_dim=16, depth=1, num_heads=2)
MASK = {"unit": 16, "ratio": 0.75}


def make_simmim() -> SimMIM:
    return SimMIM(build_encoder(SPEC)).eval()


def test_the_card_gets_every_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = record(monkeypatch, module, "write_card")
    model, facts = make_simmim(), SimpleNamespace()
    picture = Image.new("RGB", (4, 4))
    given: dict[str, Any] = {"facts": facts, "mask": MASK, "license": "mit"}
    save_pretrained(model, tmp_path / "a", **given, picture=picture)
    save_pretrained(model, tmp_path / "b")
    own = {"folder": tmp_path / "a", "model": model, "picture": True}
    assert cards == [
        own | given,
        {"folder": tmp_path / "b", "model": model, "facts": None, "mask": None, "picture": False}
        | {"license": "unknown"},
    ]
    assert trained_mask(tmp_path / "a") == MASK
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == json.loads(json.dumps(describe(model, MASK)))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["mask"] is None


def test_a_picture_is_an_image_or_a_file(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image.save(tmp_path / "drawn.png")
    model, out = make_simmim(), tmp_path / "out"
    save_pretrained(model, out, picture=tmp_path / "drawn.png")
    assert (out / "reconstruction.png").read_bytes() == (tmp_path / "drawn.png").read_bytes()
    save_pretrained(model, tmp_path / "other", picture=image)
    with Image.open(tmp_path / "other" / "reconstruction.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(image))
    assert (tmp_path / "drawn.png").exists()
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    # that of a model of before does not stay beside another
    save_pretrained(model, out, overwrite=True)
    assert not (out / "reconstruction.png").exists()


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_pretrained(make_simmim(), "~/out") == tmp_path / "out"
    export("~/out", "~/again")
    assert (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_model_is_replaced_unasked(name: str, tmp_path: Path) -> None:
    check_output(tmp_path, overwrite=False)
    check_output(tmp_path / "new", overwrite=False)
    (tmp_path / "notes.txt").write_text("")
    check_output(tmp_path, overwrite=False)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} exists; choose another folder or overwrite it"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)


def test_a_run_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is the folder of a run; choose another folder"):
            check_output(tmp_path, overwrite)
        with pytest.raises(ValueError, match=r"run\.json: is a file; choose another folder"):
            check_output(tmp_path / "run.json", overwrite)
    with pytest.raises(ValueError, match="is the folder of a run"):
        save_pretrained(make_simmim(), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is the folder of a run"):
        export("nowhere", tmp_path, overwrite=True)


class Recorded:
    """`export` with everything that it calls recorded."""

    def __init__(self, patch: pytest.MonkeyPatch, model: Any, picture: Path | None) -> None:
        self.facts = SimpleNamespace(picture=picture)
        self.best = record(patch, module, "best_weights", lambda **given: Path("best"))
        self.found = record(patch, module, "find_weights", lambda **given: Path("found"))
        self.loaded = record(patch, module, "load_model", lambda **given: model)
        self.read = record(patch, module, "read_facts", lambda **given: self.facts)
        self.masks = record(patch, module, "trained_mask", lambda **given: MASK)
        self.drawn = record(patch, module, "reconstruct_files", lambda **given: "drawn")
        self.saved = record(patch, module, "save_pretrained")


@pytest.mark.parametrize(
    ("given", "picture"),
    [
        ({}, Path("run.png")),
        ({"with_picture": False}, None),
        ({"images": (Path("a"), Path("b"))}, "drawn"),
        ({"license": "mit", "overwrite": True}, Path("run.png")),
    ],
)
def test_an_export_is_of_the_best_weights_with_the_facts_of_their_run(
    given: dict[str, Any], picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_simmim()
    called = Recorded(monkeypatch, model, Path("run.png"))
    assert export("run", tmp_path / "out", **given) is model
    assert [[*call.values()] for call in called.best] == [["run"]]
    assert [[*call.values()] for call in called.found] == [[Path("best")]]
    assert [[*call.values()] for call in called.loaded] == [[Path("found")]]
    assert [[*call.values()] for call in called.read] == [[Path("found")]]
    assert [[*call.values()] for call in called.masks] == [[Path("found")]]
    assert called.drawn == (
        [{"model": model, "files": [Path("a"), Path("b")], "mask_unit": 16, "ratio": 0.75,
          "seed": 0}] if "images" in given else []
    )  # fmt: skip
    assert called.saved == [
        {
            "model": model,
            "folder": tmp_path / "out",
            "facts": called.facts,
            "mask": MASK,
            "picture": picture,
            "license": given.get("license", "unknown"),
            "overwrite": given.get("overwrite", False),
        }
    ]


def test_a_classifier_has_no_mask_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Classifier(build_encoder(SPEC), ("cat", "dog"))
    called = Recorded(monkeypatch, model, Path("run.png"))
    export("run", tmp_path / "out")
    assert called.masks == []
    assert (called.saved[0]["mask"], called.saved[0]["picture"]) == (None, None)
    with pytest.raises(ValueError, match=r"^run: a classifier reconstructs nothing; leave out"):
        export("run", tmp_path / "out", images=[Path("a")])
