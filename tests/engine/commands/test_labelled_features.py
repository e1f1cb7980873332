"""What `simmim probe` and `simmim knn` share: every flag arrives, and memory is counted."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recorded_calls import record
from simmim.commands import labelled_features as module
from simmim.commands.labelled_features import (
    FLAGS,
    add_sets,
    check_output,
    image_size,
    note,
    open_sets,
    prepare,
    take_features,
)
from simmim.data.labels import Labels
from simmim.data.splits import LabelledImages
from simmim.downstream.features import Features
from simmim.errors import DataError


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_sets(parser, layers="output")
    return parser.parse_args(["weights", "--train=photos", *arguments])


def labelled(name: str, count: int) -> LabelledImages:
    source = SimpleNamespace(names=[f"{name}{n}" for n in range(count)])
    return LabelledImages(source, Labels(np.arange(count), ("a", "b", "c")), name)  # type: ignore[arg-type]


def test_defaults() -> None:
    assert vars(flags()) == {
        "checkpoint": "weights",
        "train": "photos",
        "val": "",
        "val_labels": "",
        "holdout": None,
        "fraction": 1.0,
        "seed": 0,
        "layers": "output",
        "image_size": None,
        "margin": None,
        "memory_gib": 8.0,
        "output": None,
        "overwrite": False,
        "labels": None,
        "classes": None,
        "first_number": None,
        "workers": -1,
        "value_range": None,
        "device": "auto",
        "precision": "float32",
        "batch_size": 64,
    }
    with pytest.raises(argparse.ArgumentError):
        flags("--holdout=0")


def test_flags_of_the_two_sets_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, module, "open_labelled_sets")
    open_sets(flags())
    explained = ["--labels=l.csv", "--val-labels=w.csv", "--classes=c.txt", "--first-number=0"]
    open_sets(flags("--val=more", "--fraction=0.25", "--seed=3", *explained))
    open_sets(flags("--holdout=5"))
    default = {
        "path": "photos",
        "seed": 0,
        "val_path": "",
        "num_held_out": 0,
        "fraction": 1.0,
        "labels": "",
        "val_labels": "",
        "classes": "",
        "first_number": None,
        "names": FLAGS,
    }
    assert calls == [
        default,
        default
        | {"seed": 3, "val_path": "more", "fraction": 0.25}
        | {"labels": "l.csv", "val_labels": "w.csv", "classes": "c.txt", "first_number": 0},
        default | {"num_held_out": 5},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val=a", "--holdout=3"], "leave out --val"),
        (["--val-labels=a"], "--val-labels is the label file of --val; there is none"),
        (["--classes=a"], "explain a label file; there is none"),
        (["--first-number=0"], "explain a label file; there is none"),
        (["--fraction=0"], "--fraction=0.0: choose a share above 0 and up to 1"),
        (["--fraction=1.01"], "--fraction=1.01: choose a share above 0 and up to 1"),
    ],
)
def test_flags_that_contradict_one_another(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(monkeypatch, module, "open_labelled_sets")
    with pytest.raises(ValueError, match=message):
        open_sets(flags(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--labels=a", "--classes=b"],
        ["--labels=a", "--first-number=0"],
        ["--val=a", "--val-labels=b", "--first-number=1"],
        ["--fraction=1"],
    ],
)
def test_flags_that_go_together(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, module, "open_labelled_sets")
    open_sets(flags(*arguments))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "size"),
    [([], None), (["--image-size", "96"], 96), (["--image-size", "96", "64"], [96, 64])],
)
def test_the_size_of_images(arguments: list[str], size: Any) -> None:
    assert image_size(flags(*arguments)) == size
    with pytest.raises(ValueError, match="--image-size takes one or two numbers"):
        image_size(flags("--image-size", "1", "2", "3"))


def test_results_are_not_replaced_unasked(tmp_path: Path) -> None:
    check_output(None, ("a", "b"), overwrite=False)
    check_output(tmp_path / "new", ("a", "b"), overwrite=False)
    (tmp_path / "other").write_text("")
    check_output(tmp_path, ("a", "b"), overwrite=False)
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match=r"b exists; choose another --output or add --overwrite"):
        check_output(tmp_path, ("a", "b"), overwrite=False)
    check_output(tmp_path, ("a", "b"), overwrite=True)
    with pytest.raises(ValueError, match="b is a file; choose another --output"):
        check_output(tmp_path / "b", ("a", "b"), overwrite=True)


def test_flags_of_encoding_arrive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def extract(**given: Any) -> Features:
        given["report"]("b/1: broken")
        given["advance"](1)
        ids = np.arange(1, len(given["source"].names))  # the first image is broken
        return Features(ids, {"output": torch.full((len(ids), 2), float(len(ids)))})

    model: Any = SimpleNamespace(name="model")
    views = record(monkeypatch, module, "evaluation_view", lambda **given: "view")
    record(monkeypatch, module, "feature_shapes", lambda **given: {"output": (2,)})
    calls = record(monkeypatch, module, "extract_features", extract)
    given = flags("--margin=1.5", "--value-range", "0", "9", "--batch-size=3", "--workers=2",
                  "--precision=bf16")  # fmt: skip
    sets = [labelled("train", 4), labelled("val", 3)]
    (train, train_labels), (val, val_labels) = take_features(given, model, sets, ["output"])
    assert views == [{"model": model, "margin": 1.5, "value_range": (0.0, 9.0)}]
    for call, part in zip(calls, sets, strict=True):
        options = {k: v for k, v in call.items() if k not in ("report", "advance")}
        assert options == {
            "model": model,
            "source": part.source,
            "dtype": torch.float32,
            "layers": ["output"],
            "batch_size": 3,
            "view": "view",
            "workers": 2,
            "precision": "bf16",
        }
    assert capsys.readouterr().err.count("simmim: b/1: broken\n") == 2
    # labels are those of the images that could be read
    assert train_labels.values.tolist() == [1, 2, 3]
    assert val_labels.values.tolist() == [1, 2]
    assert train_labels.classes == ("a", "b", "c")
    assert (train["output"].shape, val["output"].shape) == ((3, 2), (2, 2))


def test_a_set_without_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(**given: Any) -> Features:
        raise DataError("no image can be read")

    record(monkeypatch, module, "evaluation_view")
    record(monkeypatch, module, "feature_shapes", lambda **given: {"output": (2,)})
    record(monkeypatch, module, "extract_features", extract)
    with pytest.raises(DataError, match=r"^train: no image can be read$"):
        take_features(flags(), SimpleNamespace(), [labelled("train", 1)], ["output"])  # type: ignore[arg-type]


# 6 + 2 images of 256 bytes in float32 are 2048
KIB = 2.0**-20


@pytest.mark.parametrize(
    ("gib", "dtype", "told"),
    [
        (2 * KIB, torch.float32, "features of 8 images: 0.0 MiB of memory"),
        (1.99 * KIB, torch.float16, "features of 8 images: 0.0 MiB of memory, in float16"),
        (1 * KIB, torch.float16, "in float16"),
    ],
)
def test_memory_decides_the_precision(
    gib: float,
    dtype: torch.dtype,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(monkeypatch, module, "evaluation_view")
    shapes = record(monkeypatch, module, "feature_shapes", lambda **given: {"a": (32,), "b": (32,)})
    calls = record(
        monkeypatch, module, "extract_features", lambda **given: Features(np.arange(1), {})
    )
    model: Any = SimpleNamespace()
    sets = [labelled("train", 6), labelled("val", 2)]
    take_features(flags(f"--memory-gib={gib}"), model, sets, ["a", "b"])
    assert shapes == [{"model": model, "layers": ["a", "b"]}]
    assert [call["dtype"] for call in calls] == [dtype, dtype]
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "arguments", "advice"),
    [
        # 2 of 6 training images fit beside the 2 validated on: (2 · 512 - 2 · 256) / 256 of 6
        (0.5 * KIB, [], ", or take --fraction=0.333"),
        (0.5 * KIB, ["--fraction=0.5"], ", or take --fraction=0.166"),
        (0.25 * KIB, [], "allow more"),
        (0.2 * KIB, [], "allow more"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    gib: float, arguments: list[str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(monkeypatch, module, "evaluation_view")
    record(monkeypatch, module, "feature_shapes", lambda **given: {"a": (64,)})
    sets = [labelled("train", 6), labelled("val", 2)]
    model: Any = SimpleNamespace()
    with pytest.raises(ValueError, match=r"features of 8 images take 0\.0 MiB in float16") as error:
        take_features(flags(f"--memory-gib={gib}", *arguments), model, sets, ["a"])
    assert str(error.value).endswith(advice)
    assert f"more than --memory-gib={gib:g}: choose fewer --layers" in str(error.value)


@pytest.mark.parametrize(
    ("images", "told"), [(2**20, "1.0 GiB of memory"), (2**20 - 1024, "1023.0 MiB of memory")]
)
def test_memory_is_told_in_units(
    images: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(monkeypatch, module, "evaluation_view")
    record(monkeypatch, module, "feature_shapes", lambda **given: {"a": (256,)})
    record(monkeypatch, module, "extract_features", lambda **given: Features(np.arange(1), {}))
    part = LabelledImages(SimpleNamespace(), Labels(np.zeros(images, np.int64), ("a",)), "train")  # type: ignore[arg-type]
    model: Any = SimpleNamespace()
    take_features(flags(), model, [part], ["a"])
    assert capsys.readouterr().err == f"simmim: features of {images:,} images: {told}\n"


def test_model_layers_and_sets_are_those_of_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.device] = []
    model = SimpleNamespace(to=lambda device: moved.append(device) or model)
    sets = (labelled("photos", 4), labelled("more", 3))
    device = torch.device("meta")
    worlds = record(
        monkeypatch, module, "pick_world", lambda **given: SimpleNamespace(device=device)
    )
    outputs = record(monkeypatch, module, "check_output")
    record(monkeypatch, module, "open_sets", lambda **given: sets)
    loaded = record(monkeypatch, module, "load_for_features", lambda **given: model)
    picked = record(monkeypatch, module, "pick_layers", lambda **given: ["block 2"])
    trained, validated = ({"block 2": torch.zeros(n)} for n in (3, 2))
    labels = [Labels(np.arange(n), ("a", "b", "c")) for n in (3, 2)]
    taken = record(
        monkeypatch,
        module,
        "take_features",
        lambda **given: [(trained, labels[0]), (validated, labels[1])],
    )
    given = flags("--device=cpu", f"--output={tmp_path}", "--layers=2", "--image-size", "96")
    features = prepare(given, ("x.json",))
    assert worlds == [{"device": "cpu"}]
    assert outputs == [{"folder": tmp_path, "files": ("x.json",), "overwrite": False}]
    assert loaded == [{"path": "weights", "image_size": 96}]
    assert picked == [{"model": model, "text": "2"}]
    assert moved == [device]
    assert taken == [{"given": given, "model": model, "sets": sets, "layers": ["block 2"]}]
    assert (features.device, features.layers) == (device, ["block 2"])
    assert (features.train, features.train_labels) == (trained, labels[0])
    assert (features.val, features.val_labels) == (validated, labels[1])
    assert features.about == {
        "checkpoint": "weights",
        "train": {"source": "photos", "images": 3},
        "val": {"source": "more", "images": 2},
        "classes": 3,
        "pool": "mean",
    }
    prepare(flags("--overwrite"), ())
    assert outputs[1] == {"folder": None, "files": (), "overwrite": True}


def test_a_note_shows_every_character(capsys: pytest.CaptureFixture[str]) -> None:
    note("a\nb")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("simmim: a")
    assert captured.err.count("\n") == 1
