"""Fine-tuning by the command: it learns, resumes bit for bit, and refuses bad input in a line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import forked_command
import held_command
from forked_command import ROOT, Started, finish
from simmim import cli
from simmim.downstream import finetune as finetuning
from simmim.model.classifier import Classifier
from simmim.weights.load import load_model

ENVIRONMENT = os.environ | forked_command.ENVIRONMENT
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40)}


def write_classes(folder: Path, per_class: int, seed: int, classes: dict = COLOURS) -> Path:
    """Class folders of noisy images of one colour each."""
    generator = np.random.default_rng(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            noise = generator.integers(-60, 60, (72, 64, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `val` with three classes each."""
    root = tmp_path_factory.mktemp("labelled")
    write_classes(root / "train", 16, 0)
    write_classes(root / "val", 6, 1)
    return root


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "pretrained"
    arguments = [
        "pretrain", "smoke", f"--data.path={images / 'train'}", f"--output={output}",
        "--train.steps=6", "--data.workers=0",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    return output


def flags(pretrained: Path | str, images: Path, output: Path, *more: str) -> list[str]:
    return [
        "finetune", "finetune_smoke", f"--pretrained={pretrained}", f"--data.path={images}",
        f"--output={output}", "--data.workers=0", "--seed=3", *more,
    ]  # fmt: skip


def rows(output: Path, name: str = "evaluations") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(pretrained: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run: 48 images, 6 steps an epoch."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert cli.main(flags(pretrained, images, output, "--train.steps=24")) == 0
    return output


def test_it_learns_and_leaves_everything_behind(straight: Path, images: Path) -> None:
    found = rows(straight)
    assert [row["step"] for row in found] == [6, 12, 18, 24]
    assert found[-1]["top1"] == 1.0
    assert found[0]["images"] == 18
    assert [row["step"] for row in rows(straight, "metrics")] == list(range(1, 25))
    best = min(row["step"] for row in found if row["top1"] == max(r["top1"] for r in found))
    table = (straight / "best" / "per_class.csv").read_text().splitlines()
    assert table[0] == "class,images,correct,top1,top5"
    assert [line.split(",")[:2] for line in table[1:]] == [[name, "6"] for name in COLOURS]
    right = sum(int(line.split(",")[2]) for line in table[1:])
    assert right == round(18 * next(row["top1"] for row in found if row["step"] == best))
    confusion = (straight / "best" / "confusion.csv").read_text().splitlines()
    assert confusion[0] == "true \\ answered,blue,green,red"
    with Image.open(straight / "best" / "confusion.png") as picture:
        assert np.asarray(picture).std() > 20
    model = load_model(straight / "best.safetensors")
    assert isinstance(model, Classifier)
    assert model.classes == tuple(COLOURS)
    handover = (straight / "handover.txt").read_text()
    assert "new       head.weight" in handover
    assert "unused    decoder.0.weight" in handover
    log = (straight / "log.txt").read_text()
    assert "48 training images of 3 classes" in log
    assert "top-1 100.00%" in log


def run_command(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    if not launcher:
        return finish("simmim", *arguments)
    command = [sys.executable, *launcher, "-m", "simmim", *arguments]
    return subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def same_end(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "best.safetensors"):
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), (name, key)
    assert rows(a) == rows(b)
    assert [r["loss"] for r in rows(a, "metrics")] == [r["loss"] for r in rows(b, "metrics")]


def test_killed_runs_end_bitwise_equal(
    straight: Path, pretrained: Path, images: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first checkpoints, twice; then in another process to the end."""
    output = tmp_path / "killed"
    arguments = flags(pretrained, images, output, "--train.steps=24", "--train.ema_decay=0.9")
    whole = tmp_path / "whole"
    again = [a.replace(str(output), str(whole)) for a in arguments]
    assert run_command(*again).returncode == 0
    for kill_at in (5, 14):
        held = held_command.environment(20, tmp_path / "never")
        process = Started(held_command.PATH, *arguments, environment=held)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            reached = (output / "metrics.jsonl").exists() and len(rows_so_far(output)) >= kill_at
            if reached:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        assert process.wait() == -signal.SIGKILL
    assert run_command(*arguments).returncode == 0
    same_end(whole, output)
    # the averaged weights are what was evaluated and exported, not those that train
    newest = output / "checkpoints" / "step_00000024"
    last, average = (
        load_file(newest / "model.safetensors"),
        load_file(newest / "average.safetensors"),
    )
    exported = load_file(output / "model.safetensors")
    assert all(torch.equal(exported[key], average[key]) for key in exported)
    assert not torch.equal(last["head.weight"], average["head.weight"])


def rows_so_far(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


def test_a_signal_saves_and_the_same_command_goes_on(
    pretrained: Path, images: Path, tmp_path: Path
) -> None:
    output, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = flags(pretrained, images, output, "--train.steps=18")
    again = [a.replace(str(output), str(whole)) for a in arguments]
    assert run_command(*again).returncode == 0
    go_on = tmp_path / "go-on"
    held = held_command.environment(14, go_on)
    process = Started(held_command.PATH, *arguments, environment=held)
    while process.poll() is None and not (output / "evaluations.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    go_on.touch()
    _, words = process.communicate(timeout=600)
    assert process.returncode == 75, words
    assert "the same command resumes" in words
    # pre-trained weights are needed no more
    moved = [a.replace(f"--pretrained={pretrained}", "--pretrained=gone") for a in arguments]
    assert run_command(*moved).returncode == 0
    same_end(whole, output)


def test_a_signal_during_an_evaluation_leaves_it_for_later(
    straight: Path,
    pretrained: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "stopped"
    arguments = flags(pretrained, images, output, "--train.steps=24")
    real = finetuning.evaluate
    calls = []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the handler does not let this end
        return real(*given, **named)

    monkeypatch.setattr(finetuning, "evaluate", interrupted)
    assert cli.main(arguments) == 75
    assert [row["step"] for row in rows(output)] == [6]
    assert (output / "checkpoints" / "step_00000012").is_dir()
    monkeypatch.setattr(finetuning, "evaluate", real)
    assert cli.main(arguments) == 0
    same_end(straight, output)


def test_two_processes_are_one(pretrained: Path, images: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--train.steps=6", "--model.drop_path=0", "--augment.smoothing=0.1")
    assert run_command(*flags(pretrained, images, one, *options)).returncode == 0
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    result = run_command(*flags(pretrained, images, two, *options), launcher=launcher)
    assert result.returncode == 0, result.stderr
    losses = [[row["loss"] for row in rows(folder, "metrics")] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = rows(one)[-1], rows(two)[-1]
    assert first["images"] == second["images"] == 18
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for key in weights[0]:
        assert torch.allclose(weights[0][key], weights[1][key], rtol=1e-3, atol=1e-5), key


def test_another_size_window_and_no_pretraining(
    pretrained: Path, images: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    options = ("--data.image_size=[96,144]", "--model.window_size=6", "--train.steps=2")
    assert cli.main(flags(pretrained, images, larger, *options)) == 0
    handover = (larger / "handover.txt").read_text()
    table = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    assert f"remapped  {table}: window 4×4 → 6×6" in handover
    assert load_model(larger).encoder.spec.image_size == (96, 144)
    scratch = [
        "finetune", "finetune_smoke", "--model.name=vit_tiny", "--model.embed_dim=24",
        "--model.num_heads=[2]", "--model.depths=[2]", "--data.image_size=32",
        f"--data.path={images / 'train'}", "--data.holdout=9", "--train.steps=2",
        "--train.precision=bf16", f"--output={tmp_path / 'scratch'}", "--data.workers=0",
    ]  # fmt: skip
    assert cli.main(scratch) == 0
    assert rows(tmp_path / "scratch")[-1]["images"] == 9
    spec = load_model(tmp_path / "scratch").encoder.spec
    assert spec.layer_relative_position  # type: ignore[union-attr]
    assert not spec.final_norm  # type: ignore[union-attr]


def test_a_fraction_of_the_labels(pretrained: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "tenth"
    options = ("--data.fraction=0.25", "--train.steps=1", "--train.precision=fp16")
    assert cli.main(flags(pretrained, images, output, *options)) == 0
    assert "12 training images of 3 classes" in (output / "log.txt").read_text()


def test_a_finished_run_is_left_alone(straight: Path, pretrained: Path, images: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    assert cli.main(flags(pretrained, images, straight, "--train.steps=24")) == 0
    changed = {p.name for p, stamp in before.items() if p.stat().st_mtime_ns != stamp}
    assert changed <= {"log.txt", ".lock", "metrics.jsonl", "evaluations.jsonl"}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    capsys.readouterr()
    code = cli.main(arguments)
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.count("\n") == 1, message
    assert message.startswith("simmim: error: ")
    for word in words:
        assert word in message


def test_bad_input_is_one_line(
    pretrained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    good = pretrained / "model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    state = load_file(good)
    state["encoder.norm.weight"][0] = float("inf")
    save_file(state, tmp_path / "inf.safetensors")
    other = write_classes(tmp_path / "other", 2, 0, {"blue": (0, 0, 255), "pink": (255, 80, 180)})
    (tmp_path / "empty").mkdir()
    flat = write_classes(tmp_path / "flat" / "x", 3, 0, {"only": (9, 9, 9)})
    labels = tmp_path / "labels.csv"
    labels.write_text("blue/000.png,0\nblue/001.png,-4\n")
    cases: list[tuple[list[str], tuple[str, ...]]] = [
        (flags("missing", images, out), ("missing: no such file or folder",)),
        (flags(tmp_path / "cut.safetensors", images, out), ("cut.safetensors", "not a readable")),
        (
            flags(tmp_path / "inf.safetensors", images, out),
            ("inf.safetensors", "encoder.norm.weight holds values that are not finite"),
        ),
        (
            flags(pretrained, images, out, "--model.name=vit_tiny", "--data.image_size=64"),
            (str(pretrained), "holds a Swin (width 16", "the model is a ViT"),
        ),
        (flags(pretrained, images, out, "--data.image_size=100"), ("100×100 px is no multiple",)),
        (
            flags(pretrained, images / "train", out, f"--data.val_path={other}"),
            (f"data.val_path={other}: the validation set's", "unknown pink", "missing green, red"),
        ),
        (
            flags(pretrained, images / "train", out, f"--data.val_path={tmp_path / 'empty'}"),
            (f"data.val_path={tmp_path / 'empty'}: no image",),
        ),
        (flags(pretrained, flat, out), ("of one class",)),
        (flags(pretrained, images / "train", out, f"--data.labels={labels}"), ("labels.csv",)),
        (
            flags(pretrained, tmp_path / "nowhere", out),
            (f"data.path={tmp_path / 'nowhere'}: no such file",),
        ),
        (
            flags(pretrained, images, out, "--data.holdout=4"),
            ("data.holdout=4 holds nothing out", str(images / "val"), "leave it out"),
        ),
        (
            flags(pretrained, images / "train", out, "--data.holdout=48"),
            (f"data.path={images / 'train'}: data.holdout: ",),
        ),
        (flags(pretrained, images, out, "--data.fraction=0"), ("data.fraction=0",)),
        (flags(pretrained, images, out, "--optim.layer_dekay=1"), ("optim.layer_decay",)),
        (flags(pretrained, images, out, "--augment.mixup=0.8", "--train.batch_size=7"), ("even",)),
        (["finetune"], ("CONFIG is missing", "finetune_small")),
        (["finetune", "smoke"], ("smoke is a recipe of `simmim pretrain`",)),
        (["pretrain", "finetune_smoke"], ("finetune_smoke is a recipe of `simmim finetune`",)),
        (["finetune", "finetune_smoke", f"--data.path={images}"], ("pretrained is not set",)),
    ]
    for arguments, words in cases:
        refused(capsys, arguments, *words)
        assert not any((out / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def test_settings_that_cannot_change_midway(
    straight: Path, pretrained: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (straight / "config.toml").read_text()
    for option in ("--seed=4", "--train.batch_size=4", "--model.drop_path=0.2"):
        key = option[2:].split("=")[0]
        refused(capsys, flags(pretrained, images, straight, "--train.steps=30", option), key)
    assert (straight / "config.toml").read_text() == before
