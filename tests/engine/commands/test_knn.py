"""`simmim knn`: scores in the terminal and in a file, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recorded_calls import record
from simmim.backbone.build import build_encoder
from simmim.backbone.vit import ViTSpec
from simmim.commands import knn as command
from simmim.commands.labelled_features import LabelledFeatures
from simmim.data.labels import Labels
from simmim.downstream.knn import NeighbourScore
from simmim.method.simmim import SimMIM
from simmim.model import weights_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images of each of two colours in class folders, and a model."""
    draw = np.random.default_rng(0)
    for name, colour in {"green": (30, 180, 60), "red": (200, 40, 40)}.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = np.array(colour) + draw.integers(-30, 31, (20, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    spec = ViTSpec(image_size=(16, 16), patch_size=8, embed_dim=8, depth=2, num_heads=2)
    weights_file.save_weights(SimMIM(build_encoder(spec)), tmp_path / "model.safetensors")
    return tmp_path


def call(data: Path, *arguments: str) -> int:
    return command.main(
        [
            str(data / "model.safetensors"),
            f"--train={data / 'data'}",
            "--workers=0",
            "--device=cpu",
            *arguments,
        ]
    )


def test_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "out"
    arguments = ["--holdout=8", "--k=1,5,40", "--layers=1,output", f"--output={out}"]
    assert call(data, *arguments) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "nearest neighbours, 2 classes: 16 images vote on 8"
    assert lines[1].split() == ["layer", "k", "top-1", "top-5"]
    assert [line.split()[-3:-1] for line in lines[2:5]] == [
        ["1", "100.00%"],
        ["5", "100.00%"],
        ["16", "100.00%"],
    ]
    assert lines[5].split() == ["output", "1", "100.00%", "100.00%"]
    assert "k=40 is more than the 16 training images: all vote" in captured.err
    found = json.loads((out / "knn.json").read_text())
    assert found["temperature"] == 0.07
    assert found["val"] == {"source": f"{data / 'data'} (held out)", "images": 8}
    assert [(s["layer"], s["k"], s["top1"]) for s in found["scores"]] == [
        (layer, k, 1.0) for layer in ("block 1", "output") for k in (1, 5, 16)
    ]
    assert call(data, *arguments) == 2
    assert f"{out / 'knn.json'} exists" in capsys.readouterr().err
    assert call(data, *arguments, "--overwrite", "--batch-size=3") == 0


@pytest.mark.parametrize("flag", ["--k=0", "--k=a", "--k=1,,2", "--temperature=0"])
def test_command_refuses_wrong_numbers(
    data: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(data, flag)
    assert stopped.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_help_says_what_neighbours_are_worth(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "no fair measure of a SimMIM encoder" in capsys.readouterr().out


def prepared() -> LabelledFeatures:
    """Features of seven and two images, of which every set and layer has its own."""
    train = {name: torch.full((7, 3), float(n)) for n, name in enumerate(["block 1", "output"])}
    val = {name: torch.full((2, 3), 10.0 + n) for n, name in enumerate(["block 1", "output"])}
    labels = [Labels(np.arange(n) % 2, ("a", "b")) for n in (7, 2)]
    about = {"train": {"images": 7}, "val": {"images": 2}, "classes": 2, "pool": "mean"}
    device = torch.device("meta")
    return LabelledFeatures(device, [*train], train, labels[0], val, labels[1], about)


@pytest.mark.parametrize(
    ("flags", "k", "temperature"),
    [
        ([], (1, 5, 20, 200), 0.07),
        (["--k=3,2", "--temperature=0.5"], (3, 2), 0.5),
        (["--k=7"], (7,), 0.07),
    ],
)
def test_every_flag_arrives(
    flags: list[str],
    k: tuple[int, ...],
    temperature: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = prepared()
    advanced: list[int] = []

    def score(**given: Any) -> list[NeighbourScore]:
        given["advance"](2)
        advanced.append(2)
        return [NeighbourScore(4, 0.25, 0.75)]

    asked = record(monkeypatch, command, "prepare", lambda **given: features)
    calls = record(monkeypatch, command, "score_neighbours", score)
    assert command.main(["weights", "--train=photos", f"--output={tmp_path}", *flags]) == 0
    assert asked[0]["results"] == ("knn.json",)
    assert (asked[0]["given"].checkpoint, asked[0]["given"].train) == ("weights", "photos")
    assert asked[0]["given"].layers == "output"
    for layer, call in zip(["block 1", "output"], calls, strict=True):
        del call["advance"]
        assert call.pop("bank") is features.train[layer]
        assert call.pop("bank_labels") is features.train_labels.values
        assert call.pop("queries") is features.val[layer]
        assert call.pop("labels") is features.val_labels.values
        assert call == {"neighbours": k, "temperature": temperature, "device": features.device}
    captured = capsys.readouterr()
    clipped = [number for number in k if number > 7]
    assert ("k=20,200 is more than the 7 training images" in captured.err) is bool(clipped)
    assert captured.out.splitlines()[-1] == str(tmp_path)
    score_of = {"k": 4, "top1": 0.25, "top5": 0.75}
    assert json.loads((tmp_path / "knn.json").read_text()) == {
        **features.about,
        "temperature": temperature,
        "scores": [{"layer": "block 1", **score_of}, {"layer": "output", **score_of}],
    }


def test_without_an_output_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    record(monkeypatch, command, "prepare", lambda **given: prepared())
    record(monkeypatch, command, "score_neighbours", lambda **g: [NeighbourScore(1, 0.25, 0.75)])
    assert command.main(["weights", "--train=photos"]) == 0
    assert list(tmp_path.iterdir()) == []
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["block", "1", "1", "25.00%", "75.00%"], ["output", "1", "25.00%", "75.00%"]]
