"""Linear probes of frozen features: the optimiser, the choice of a rate, and the command."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.commands import probe as command
from simmim.data.labels import Labels
from simmim.data.splits import holdout
from simmim.downstream import probe
from simmim.downstream.probe import (
    Examples,
    Linear,
    Probed,
    Training,
    best_layer,
    probe_layers,
    score,
    train_linear,
)
from simmim.method.simmim import SimMIM
from simmim.model import weights_file
from simmim_kernels.splitmix import fold, permutation

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clusters(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Labels]:
    """Features [N, 6] around a place for each of three classes."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 3, count)
    values[:3] = [0, 1, 2]
    places = np.random.default_rng(7).normal(size=(3, 6)) * 2 + 5
    features = places[values] + spread * draw.normal(size=(count, 6))
    return torch.tensor(features, dtype=torch.float32), Labels(values.astype(np.int64), NAMES)


def examples(features: Tensor, labels: Labels) -> Examples:
    return Examples(features, torch.from_numpy(labels.values), torch.arange(len(features)))


def by_torch(
    features: Tensor, labels: Labels, rate: float, training: Training
) -> tuple[Tensor, Tensor]:
    """One probe by torch's layers: BatchNorm without gain and bias, SGD, CosineAnnealingLR."""
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6, momentum=None).double()
    norm(features.double())
    norm.eval()
    # torch's running variance is that of a sample, divided by N - 1
    norm.running_var *= (len(features) - 1) / len(features)
    linear = nn.Linear(features.shape[1], 3).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), rate, momentum=0.9)
    steps = training.epochs * -(-len(features) // training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    y = torch.from_numpy(labels.values)
    for epoch in range(training.epochs):
        order = permutation(fold(probe.STREAM, training.seed, epoch), len(features))
        for part in torch.split(torch.from_numpy(order), training.batch_size):
            optimizer.zero_grad()
            logits = linear(norm(features[part].double()))
            nn.functional.cross_entropy(logits, y[part]).backward()
            optimizer.step()
            schedule.step()
    return linear.weight.detach().float(), linear.bias.detach().float()


def test_every_rate_trains_as_torch_would() -> None:
    features, labels = clusters(50, seed=1)
    training = Training(epochs=4, batch_size=16, seed=3)
    rates = (0.003, 0.1, 1.0)
    found = train_linear(examples(features, labels), 3, rates, training)
    for number, rate in enumerate(rates):
        weight, bias = by_torch(features, labels, rate, training)
        own = found.weight.view(6, 3, 3)[:, number].T
        torch.testing.assert_close(own, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias.view(3, 3)[number], bias, rtol=1e-4, atol=1e-5)


def test_standardised_features_have_mean_0_and_variance_1() -> None:
    features, labels = clusters(40, seed=2)
    some = examples(features, labels)._replace(members=torch.arange(5, 30))
    mean, scale = probe.standardisation(some)
    standard = (features[5:30] - mean) * scale
    torch.testing.assert_close(standard.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.square().mean(0), torch.ones(6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk_values", [8, 2**24])
def test_scores_count_ties_for_the_lower_class(
    monkeypatch: pytest.MonkeyPatch, chunk_values: int
) -> None:
    monkeypatch.setattr(probe, "CHUNK_VALUES", chunk_values)
    K = 7
    bias = torch.zeros(2, K)
    bias[1, 2] = float("nan")
    classifiers = Linear(torch.zeros(1), torch.ones(1), torch.zeros(1, 2 * K), bias.view(-1), 2)
    labels = torch.tensor([0, 0, 4, 5, 6])
    found = score(classifiers, Examples(torch.zeros(5, 1), labels, torch.arange(5)))
    assert (found[0].top1, found[0].top5) == (0.4, 0.6)
    assert found[0].loss == pytest.approx(np.log(7))
    assert (found[1].top1, found[1].top5, found[1].loss) == (0.0, 0.0, float("inf"))


def test_the_rate_is_picked_without_the_validation_images() -> None:
    features, labels = clusters(60, seed=1, spread=3)
    val_features, val_labels = clusters(30, seed=2, spread=3)
    training = Training(rates=(1e-5, 0.03, 30.0), epochs=10, batch_size=8)
    (found,) = probe_layers({"x": features}, labels, {"x": val_features}, val_labels, training)
    # other validation labels change the score, never the rate
    other = Labels(np.roll(val_labels.values, 1), NAMES)
    (rolled,) = probe_layers({"x": features}, labels, {"x": val_features}, other, training)
    assert (rolled.rate, rolled.picked) == (found.rate, found.picked)
    assert rolled.score != found.score
    kept, held = holdout(labels, 6, training.seed)
    every = examples(features, labels)
    tried = score(
        train_linear(every._replace(members=torch.from_numpy(kept)), 3, training.rates, training),
        every._replace(members=torch.from_numpy(held)),
    )
    assert found.picked == tuple(one.top1 for one in tried)
    best = max(zip(tried, training.rates), key=lambda pair: (pair[0].top1, -pair[0].loss))
    assert found.rate == best[1]
    # with that rate, all training images are trained on
    (final,) = score(
        train_linear(every, 3, (found.rate,), training), examples(val_features, val_labels)
    )
    assert found.score == final


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    train, val = clusters(60, seed=1, spread=4), clusters(40, seed=2, spread=4)

    def run(seed: int, features: Tensor = train[0]) -> list[Probed]:
        training = Training(rates=(0.01, 0.1), epochs=3, batch_size=8, seed=seed)
        return list(probe_layers({"x": features}, train[1], {"x": val[0]}, val[1], training))

    assert run(0) == run(0)
    assert run(0)[0].score.loss != run(1)[0].score.loss
    half = run(0, train[0].half())[0]
    assert half.score.loss == pytest.approx(run(0)[0].score.loss, rel=0.01)


def test_the_best_layer_is_found_and_separable_classes_are_separated() -> None:
    train, val = clusters(60, seed=1, spread=0.1), clusters(40, seed=2, spread=0.1)
    noise = torch.randn(60, 4), torch.randn(40, 4)
    found = list(
        probe_layers(
            {"noise": noise[0], "clusters": train[0], "again": train[0]},
            train[1],
            {"noise": noise[1], "clusters": val[0], "again": val[0]},
            val[1],
            Training(epochs=20),
        )
    )
    assert [result.layer for result in found] == ["noise", "clusters", "again"]
    assert found[0].score.top1 < 0.7
    assert found[1].score.top1 == 1.0
    assert best_layer(found).layer == "clusters"
    assert all(result.score.top5 == 1.0 for result in found)


def test_what_cannot_be_probed_is_refused() -> None:
    features = torch.randn(3, 4)
    labels = Labels(np.arange(3), NAMES)
    with pytest.raises(ValueError, match="3 training images, one of each class, are too few"):
        list(probe_layers({"x": features}, labels, {"x": features}, labels))
    (found,) = probe_layers(
        {"x": features}, labels, {"x": features}, labels, Training(rates=(0.1,))
    )
    assert (found.rate, found.picked, found.score.top1) == (0.1, (), 1.0)
    with pytest.raises(ValueError, match="classes differ"):
        list(probe_layers({"x": features}, labels, {"x": features}, Labels(np.arange(3), ())))
    with pytest.raises(ValueError, match="3 labels, but 2 features of x"):
        list(probe_layers({"x": features}, labels, {"x": features[:2]}, labels))
    unlabelled = Labels(np.array([0, 1, -1]), NAMES)
    with pytest.raises(ValueError, match="every image of a probe needs a label"):
        list(probe_layers({"x": features}, unlabelled, {"x": features}, labels))
    for wrong in ({"rates": ()}, {"rates": (0.1, float("nan"))}, {"epochs": 0}):
        with pytest.raises(ValueError, match=r"rates|epochs"):
            Training(**wrong)  # type: ignore[arg-type]


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
