"""Runs of the command, every method on every kind of backbone: what the engine promises to each."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import held_command
from forked_command import Started, finish
from simmim import cli
from simmim.method.build import methods
from simmim.weights.export import layouts_for
from simmim.weights.load import load_model, read_model
from small_run import CASES, Case, add_narrow_presets

START = """
import sys

from held_command import hold_if_asked
from simmim import cli
from simmim.backbone import build
from small_run import NARROW

hold_if_asked()
build.PRESETS.update(NARROW)
sys.exit(cli.main(sys.argv[1:]))
"""
# a ViT under SimMIM is training/test_step.py's, SimSiam on a Swin method/test_simsiam.py's
CHOSEN = {n: c for n, c in CASES.items() if n not in ("simmim-vit", "simsiam-swin")}
STEPS = 16


@dataclass(frozen=True)
class Run:
    """A case, its recipe and start script, and the folder of an unbroken run of it."""

    name: str
    case: Case
    recipe: Path
    start: Path
    output: Path
    photos: Path

    def arguments(self, output: Path, *more: str) -> list[str]:
        return [
            "pretrain", str(self.recipe), f"--data.path={self.photos}", f"--output={output}",
            "--seed=11", f"--train.steps={STEPS}", "--checkpoint.every_steps=3",
            "--log.every_steps=1", *more,
        ]  # fmt: skip

    def begin(self, output: Path, until: Path) -> Started:
        """Started; with eight steps made, the run waits for a file."""
        held = held_command.environment(8, until)
        return Started(self.start, *self.arguments(output), environment=held)

    def finish(self, output: Path, *more: str, processes: int = 1) -> str:
        done = finish(self.start, *self.arguments(output, *more), processes=processes)
        assert done.returncode == 0, done.stderr
        return done.stderr


@pytest.fixture(scope="module", autouse=True)
def _here() -> Iterator[None]:
    """Narrow presets in this process too, and one thread, because bits are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        add_narrow_presets(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CHOSEN.items(), ids=CHOSEN)
def run(
    request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    name, case = request.param
    folder = tmp_path_factory.mktemp(name)
    start = folder / "start.py"
    start.write_text(START)
    found = Run(name, case, case.write(folder), start, folder / "straight", photos)
    assert cli.main(found.arguments(found.output)) == 0
    return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `val` with noisy images of two colours."""
    folder = tmp_path_factory.mktemp("labelled")
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, colour in {"green": (30, 180, 60), "red": (200, 40, 40)}.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(8):
                pixels = np.array(colour) + draw.integers(-30, 31, (64, 64, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / part / name / f"{number}.png")
    return folder


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(a: Path, b: Path) -> None:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert [row["loss"] for row in metrics(a)] == [row["loss"] for row in metrics(b)]


def wait_for_rows(output: Path, count: int, process: Started) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        path = output / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)


def test_a_run_leaves_its_model_and_pictures(run: Run) -> None:
    model = load_model(run.output)
    method = run.name.partition("-")[0]
    assert type(model) is methods()[method].Model
    spec = model.encoder.spec
    cells = 64 // spec.stride
    features = model.encode(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, model.encoder.num_features, cells, cells)
    with Image.open(run.output / "pictures" / f"step_{STEPS:08d}.png") as picture:
        assert picture.height > 3 * 64
        assert picture.width > 3 * 64
        assert np.asarray(picture).std() > 20


def test_killed_and_stopped_runs_end_bitwise_equal(run: Run, tmp_path: Path) -> None:
    """SIGKILL, SIGKILL, SIGTERM, and then to the end."""
    output, go_on = tmp_path / "killed", tmp_path / "go-on"
    generator = random.Random(run.name)
    for rows in (2, 4):
        process = run.begin(output, go_on)
        wait_for_rows(output, rows, process)
        time.sleep(generator.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = run.begin(output, go_on)
    wait_for_rows(output, 5, process)
    process.send_signal(signal.SIGTERM)
    go_on.touch()
    _, error = process.communicate(timeout=600)
    # it may find the run before it begins to listen: the rows are those of the start before
    assert process.returncode in (75, -signal.SIGTERM), error
    if process.returncode == 75:
        assert "stopped by SIGTERM: saved at step" in error
    assert "resumed from" in run.finish(output)
    assert_same_end(output, run.output)


def test_layouts_come_back_bitwise(run: Run, tmp_path: Path) -> None:
    weights = read_model(str(run.output))
    own = {k: v for k, v in weights.state.items() if k.startswith("encoder.")}
    for layout in layouts_for(weights.spec)[1:]:
        if layout == "torchvision" and run.name.endswith("resnet"):
            continue  # its ResNets are 64 wide, this one is not; test_convnets.py has one that is
        there = tmp_path / (layout if layout == "hf" else f"{layout}.safetensors")
        back = tmp_path / f"{layout}-back.safetensors"
        code = cli.main(["convert", str(run.output), str(there), f"--to={layout}"])
        assert code == 0, layout
        assert cli.main(["convert", str(there), str(back), "--to=simmim"]) == 0, layout
        found = load_file(back)
        differing = [k for k, v in own.items() if not torch.equal(found.get(k, v.new_empty(0)), v)]
        assert set(differing) <= {"encoder.mask_token"}, layout


def test_it_is_fine_tuned_and_its_neighbours_vote(
    run: Run, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    arguments = [
        "finetune", "finetune_smoke", f"--pretrained={run.output}", f"--data.path={labelled}",
        f"--output={output}", "--data.workers=0", "--train.steps=1",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert np.isfinite(metrics(output)[-1]["loss"])
    handover = (output / "handover.txt").read_text()
    assert "new       head.weight" in handover
    assert "new       encoder." not in handover
    sets = [f"--{part}={labelled / part}" for part in ("train", "val")]
    assert cli.main(["knn", str(run.output), *sets, "--k=3", "--workers=0"]) == 0
    assert "top-1" in capsys.readouterr().out


def test_two_processes_are_one(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "two"
    run.finish(output, "--train.sync_batch_norm=true", processes=2)
    pairs = list(zip(metrics(output), metrics(run.output), strict=True))
    # rounding grows from step to step through batch norms of eight images
    for a, b in pairs[:2] if run.case.batch_norms else pairs:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)


def test_what_a_run_cannot_change_midway(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run.output / "metrics.jsonl").read_bytes()
    name = run.name.partition("-")[0]
    other = "simsiam" if name != "simsiam" else "simmim"
    own = {"tokens": ["--method.loss=l2"], "simsiam": ["--method.grey=0.5"]}.get(name, [])
    for change in [f"--method.name={other}", *own]:
        capsys.readouterr()
        code = cli.main(run.arguments(run.output, "--train.steps=30", *change.split()))
        error = capsys.readouterr().err
        assert code == 2, error
        # the recipe may have keys that the other method does not know
        assert f"{change[2:].partition('=')[0]} was " in error or "unknown key method." in error
    assert (run.output / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("recipe", "flag", "code", "message"),
    [
        ("smoke", "--method.name=simsam", 2, "did you mean simsiam?"),
        ("smoke", "--method.head=mlp", 2, "unknown flag --method.head"),
        ("tokens_smoke", "--method.grey=1", 2, "unknown flag --method.grey"),
        ("smoke", "--validate.path=/nowhere", 2, "validate.path=/nowhere"),
        ("tokens_smoke", "--validate.path=/nowhere", 2, "validate.path=/nowhere"),
    ],
)
def test_wrong_usage_is_one_line(
    recipe: str, flag: str, code: int, message: str, photos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "run"
    arguments = ["pretrain", recipe, f"--data.path={photos}", f"--output={output}", flag]
    found = cli.main(arguments)
    error = capsys.readouterr().err
    assert (found, error.strip().count("\n")) == (code, 0), error
    assert message in error
    assert not (output / "metrics.jsonl").exists()
