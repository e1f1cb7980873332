"""`simmim probe`: layers in the terminal and in files, and what it refuses."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recorded_calls import record
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.commands import probe as command
from simmim.commands.labelled_features import LabelledFeatures
from simmim.data.labels import Labels
from simmim.downstream.probe import Probed, Score, Training
from simmim.method.simmim import SimMIM
from simmim.model import weights_file

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (200, 40, 40)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train (12 of each of three colours) and val (4 of each) in class folders, and a model."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + draw.integers(-30, 31, (20, 24, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    spec = SwinSpec(
        image_size=(16, 16), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2
    )
    weights_file.save_weights(SimMIM(build_encoder(spec)), tmp_path / "model.safetensors")
    return tmp_path


def call(data: Path, *arguments: str) -> int:
    return command.main(
        [
            str(data / "model.safetensors"),
            f"--train={data / 'data' / 'train'}",
            "--workers=0",
            "--device=cpu",
            "--epochs=20",
            *arguments,
        ]
    )


def test_command_probes_every_layer(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "out"
    val = f"--val={data / 'data' / 'val'}"
    assert call(data, val, f"--output={out}") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "linear probe of 3 classes: trained on 36 images, validated on 12"
    assert lines[1].split() == ["layer", "lr", "top-1", "top-5"]
    assert [line.split()[0] for line in lines[2:5]] == ["block", "block", "output"]
    assert lines[5] == "best: block 1, top-1 100.00%"
    assert lines[6] == str(out)
    assert "features of 48 images: " in captured.err

    found = json.loads((out / "probe.json").read_text())
    assert found["train"] == {"source": str(data / "data" / "train"), "images": 36}
    assert found["val"]["images"] == 12
    assert (found["classes"], found["best"], found["seed"]) == (3, "block 1", 0)
    assert [layer["top1"] for layer in found["layers"]] == [1.0, 1.0, 1.0]
    assert all(len(layer["picked_top1"]) == len(found["rates"]) for layer in found["layers"])
    rows = list(csv.DictReader((out / "probe.csv").read_text().splitlines()))
    assert [row["layer"] for row in rows] == ["block 1", "block 2", "output"]
    assert [float(row["rate"]) for row in rows] == [layer["rate"] for layer in found["layers"]]
    with Image.open(out / "probe.png") as picture:
        assert picture.width > 500

    before = (out / "probe.json").read_bytes()
    assert call(data, val, f"--output={out}") == 2
    assert f"{out / 'probe.json'} exists" in capsys.readouterr().err
    assert call(data, val, f"--output={out}", "--overwrite", "--batch-size=5") == 0
    again = json.loads((out / "probe.json").read_text())
    for one, other in zip(again["layers"], found["layers"]):
        assert one["rate"] == other["rate"]
        assert one["picked_top1"] == other["picked_top1"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert call(data, val, f"--output={out}", "--overwrite") == 0
    assert (out / "probe.json").read_bytes() == before


def test_command_holds_out_and_takes_a_fraction(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(data, "--holdout=6", "--fraction=0.5", "--layers=output", "--rates=0.1,0.3") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "linear probe of 3 classes: trained on 15 images, validated on 6"
    assert out[-1] == "best: output, top-1 100.00%"
    root = [str(data / "model.safetensors"), f"--train={data / 'data'}", "--workers=0"]
    assert command.main([*root, "--device=cpu", "--rates=0.1", "--epochs=2"]) == 0
    assert "trained on 36 images, validated on 12" in capsys.readouterr().out


def test_command_says_where_the_sweep_ends(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(data, "--rates=1e-7,1e-6", "--layers=1", "--seed=3") == 0
    assert "the highest rate was best for block 1: higher --rates may do better" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--val=nowhere"], "nowhere: no such file or folder"),
        (["--holdout=3", "--val=x"], "--holdout makes validation images of --train"),
        (["--holdout=36"], "--holdout: count=36: of 36 labelled images in 3 classes, 0 to 33"),
        (["--val-labels=x.csv"], "--val-labels is the label file of --val"),
        (["--fraction=0"], "--fraction=0.0: choose a share above 0"),
        (["--fraction=1.5"], "--fraction=1.5: choose a share above 0"),
        (["--layers=8"], 'layer "8": the model has blocks 1 to 2'),
        (["--memory-gib=1e-6"], "choose fewer --layers, allow more, or take --fraction=0."),
        (["--labels=absent.csv"], "absent.csv"),
    ],
)
def test_command_refuses_in_one_line(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert call(data, *arguments, f"--output={data / 'out'}") == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "data." not in captured.err.replace(str(data), "")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (data / "out").exists()


def test_command_compares_classes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = data / "data" / "val"
    (val / "red").rename(val / "rot")
    assert call(data, f"--val={val}") == 2
    assert "unknown rot and missing red" in capsys.readouterr().err
    (val / "list.csv").write_text("name,label\nblue/0.png,7\n")
    labels = data / "labels.txt"
    labels.write_text("".join(f"{p.relative_to(val)} 5\n" for p in sorted(val.rglob("*.png"))))
    assert call(data, f"--val={val}", f"--val-labels={labels}") == 2
    assert "labels.txt: the lowest label is 5" in capsys.readouterr().err


def test_features_are_kept_in_float16_where_memory_is_short(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 36 images of (8 + 16 + 16) numbers
    budget = 36 * 40 * 3 / 2**30
    assert call(data, f"--memory-gib={budget}", "--rates=0.1") == 0
    captured = capsys.readouterr()
    assert "in float16" in captured.err
    assert "best: block 1, top-1 100.00%" in captured.out


def test_without_matplotlib_only_the_picture_is_missing(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert call(data, "--rates=0.1", "--layers=output", f"--output={data / 'out'}") == 0
    assert "no picture: pip install 'simmim[plots]'" in capsys.readouterr().err
    assert sorted(p.name for p in (data / "out").iterdir()) == ["probe.csv", "probe.json"]


def test_a_vit_on_seven_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(1)
    for name, level in (("dark", 60), ("light", 190)):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for number in range(8):
            values = level + draw.integers(-30, 31, (16, 16, 7))
            np.save(folder / f"{number}.npy", values.astype(np.uint8))
    spec = ViTSpec(image_size=(16, 16), patch_size=8, channels=7, embed_dim=8, depth=2, num_heads=2)
    weights_file.save_weights(SimMIM(build_encoder(spec)), tmp_path / "model.safetensors")
    (tmp_path / "data" / "train" / "dark" / "0.npy").write_bytes(b"broken")
    assert call(tmp_path, "--holdout=4", "--layers=1,output") == 0
    captured = capsys.readouterr()
    assert "best: block 1, top-1 100.00%" in captured.out
    assert "unreadable, left out: dark/0.npy" in captured.err


def prepared(classes: int) -> LabelledFeatures:
    names = tuple(map(str, range(classes)))
    train, val = ({"block 1": torch.zeros(n, 2), "output": torch.ones(n, 2)} for n in (7, 2))
    labels = [Labels(np.zeros(n, np.int64), names) for n in (7, 2)]
    about = {"train": {"images": 7}, "val": {"images": 2}, "classes": classes}
    device = torch.device("meta")
    return LabelledFeatures(device, [*train], train, labels[0], val, labels[1], about)


FOUND = [
    Probed("block 1", 0.3, Score(0.75, 0.875, 0.5), (0.25, 0.5)),
    Probed("output", 0.1, Score(0.5, 1.0, float("inf")), (0.5, 0.25)),
]


@pytest.mark.parametrize(
    ("flags", "training"),
    [
        (["--rates=0.1,0.3"], Training((0.1, 0.3), 100, 256, 0)),
        (
            ["--rates=0.1,0.3", "--epochs=7", "--sgd-batch-size=9", "--seed=4"],
            Training((0.1, 0.3), 7, 9, 4),
        ),
        ([], Training(seed=0)),
    ],
)
def test_every_flag_arrives(
    flags: list[str],
    training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = prepared(3)
    asked = record(monkeypatch, command, "prepare", lambda **given: features)
    calls = record(monkeypatch, command, "probe_layers", lambda **given: iter(FOUND))
    drawn = record(monkeypatch, command, "save_layers", lambda **given: "no picture")
    assert command.main(["weights", "--train=photos", f"--output={tmp_path}", *flags]) == 0
    assert asked[0]["results"] == ("probe.json", "probe.csv", "probe.png")
    assert (asked[0]["given"].checkpoint, asked[0]["given"].train) == ("weights", "photos")
    assert asked[0]["given"].layers == "all"
    (call,) = calls
    assert call.pop("train") is features.train
    assert call.pop("train_labels") is features.train_labels
    assert call.pop("val") is features.val
    assert call.pop("val_labels") is features.val_labels
    assert call == {"training": training, "device": features.device}
    assert drawn == [
        {
            "names": ["block 1", "output"],
            "accuracies": {"top-1": [0.75, 0.5]},
            "title": "linear probe, 3 classes, best: block 1",
            "path": tmp_path / "probe.png",
        }
    ]
    captured = capsys.readouterr()
    assert "no picture" in captured.err
    assert ("the highest rate was best for block 1:" in captured.err) is bool(flags)
    assert ("the lowest rate was best for output:" in captured.err) is bool(flags)
    rows = [line.split() for line in captured.out.splitlines()[2:4]]
    assert rows == [
        ["block", "1", "0.3", "75.00%", "87.50%"],
        ["output", "0.1", "50.00%", "100.00%"],
    ]
    written = json.loads((tmp_path / "probe.json").read_text())
    layers = written.pop("layers")
    assert written == {
        **features.about,
        "rates": [*training.rates],
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "seed": training.seed,
        "best": "block 1",
    }
    assert layers == [
        {"layer": "block 1", "rate": 0.3, "top1": 0.75, "top5": 0.875, "loss": 0.5,
         "picked_top1": [0.25, 0.5]},
        {"layer": "output", "rate": 0.1, "top1": 0.5, "top5": 1.0, "loss": None,
         "picked_top1": [0.5, 0.25]},
    ]  # fmt: skip
    assert (tmp_path / "probe.csv").read_text().splitlines() == [
        "layer,rate,top1,top5,loss",
        "block 1,0.3,0.75,0.875,0.5",
        "output,0.1,0.5,1.0,inf",
    ]


@pytest.mark.parametrize(("classes", "curves"), [(5, ["top-1"]), (6, ["top-1", "top-5"])])
def test_of_five_classes_one_of_five_is_always_right(
    classes: int, curves: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(monkeypatch, command, "prepare", lambda **given: prepared(classes))
    record(monkeypatch, command, "probe_layers", lambda **given: iter(FOUND))
    drawn = record(monkeypatch, command, "save_layers")
    assert command.main(["weights", "--train=photos", f"--output={tmp_path}"]) == 0
    assert list(drawn[0]["accuracies"]) == curves
    if classes == 6:
        assert drawn[0]["accuracies"]["top-5"] == [0.875, 1.0]


def test_one_rate_alone_is_no_end_of_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(monkeypatch, command, "prepare", lambda **given: prepared(3))
    only = Probed("output", 0.1, Score(0.5, 1.0, 0.5), ())
    record(monkeypatch, command, "probe_layers", lambda **given: iter([only]))
    assert command.main(["weights", "--train=photos", "--rates=0.1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["--rates=0", "--rates=a", "--rates=", "--epochs=0",
                                  "--sgd-batch-size=0"])  # fmt: skip
def test_numbers_that_train_nothing_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["weights", "--train=photos", flag])
    assert stop.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
