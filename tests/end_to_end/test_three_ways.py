"""The engine's command, a plain loop and Lightning reach the same losses from the same seed.

The two examples run as a reader would run them, in a process that has already imported everything.
In one thread, without clipping, all sums have the same order, and the losses are equal bit for bit.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forked_command import finish

ROOT = Path(__file__).parents[2]
# every detail that could differ: accumulation, stochastic depth, clipping in every step
MORE = ("--train.accumulation_steps=2", "--model.drop_path=0.3", "--train.clip_norm=0.05")

needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning is not installed"
)


def engine(photos: Path, output: Path, *flags: str, recipe: str = "smoke") -> list[float]:
    """Losses of the command's run."""
    result = finish(
        "simmim", "pretrain", recipe, f"--data.path={photos}", f"--output={output}", *flags
    )
    assert result.returncode == 0, result.stderr
    rows = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def example(name: str, photos: Path, *flags: str) -> list[float]:
    """Losses that an example prints, by step."""
    result = finish(str(ROOT / "examples" / name), str(photos), *flags)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("step ")]
    steps = [int(line[1]) for line in lines]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    return [float(line[3]) for line in lines]


def assert_same_bits(actual: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(np.float32(actual), np.float32(expected))


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Folder and losses of a run of the command, 14 steps."""
    output = tmp_path_factory.mktemp("three") / "engine"
    losses = engine(photos, output, "--seed=11", "--train.steps=14")
    assert len(losses) == 14
    assert len(set(losses)) == 14
    return output, losses


@pytest.fixture(scope="module")
def detailed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run of the command with all of `MORE`, 6 steps."""
    output = tmp_path_factory.mktemp("three") / "detailed"
    return engine(photos, output, "--train.steps=6", *MORE)


def test_plain_loop(photos: Path, straight: tuple[Path, list[float]]) -> None:
    losses = example("plain_pytorch.py", photos, "--seed=11", "--train.steps=14")
    assert_same_bits(losses, straight[1])


def test_plain_loop_with_every_detail(photos: Path, detailed: list[float]) -> None:
    losses = example("plain_pytorch.py", photos, "--train.steps=6", *MORE)
    # clip_grad_norm_ multiplies where the engine divides, and sums squares in another order
    np.testing.assert_allclose(losses, detailed, rtol=1e-6)


@needs_lightning
def test_lightning_and_its_resume(
    photos: Path, straight: tuple[Path, list[float]], tmp_path: Path
) -> None:
    flags = ("--seed=11", "--train.steps=14")
    losses = example("with_lightning.py", photos, *flags, f"--output={tmp_path / 'whole'}")
    assert_same_bits(losses, straight[1])
    assert_same_weights(tmp_path / "whole", straight[0])
    (checkpoint,) = (tmp_path / "whole").rglob("*step=10.ckpt")
    rest = example(
        "with_lightning.py",
        photos,
        *flags,
        f"--resume={checkpoint}",
        f"--output={tmp_path / 'resumed'}",
    )
    assert_same_bits(rest, straight[1][10:])
    assert_same_weights(tmp_path / "resumed", straight[0])


@needs_lightning
def test_lightning_with_every_detail(photos: Path, detailed: list[float], tmp_path: Path) -> None:
    flags = ("--train.steps=6", *MORE, f"--output={tmp_path}")
    losses = example("with_lightning.py", photos, *flags)
    np.testing.assert_allclose(losses, detailed, rtol=1e-6)


@needs_lightning
def test_lightning_in_two_processes(
    photos: Path, straight: tuple[Path, list[float]], tmp_path: Path
) -> None:
    """DistributedDataParallel over gloo: each process has half of the batch that one has."""
    flags = ("--seed=11", "--train.steps=14", f"--output={tmp_path}", "--devices=2")
    losses = example("with_lightning.py", photos, *flags)
    np.testing.assert_allclose(losses, straight[1], rtol=1e-5)


@needs_lightning
def test_lightning_in_two_processes_with_batch_norms(photos: Path, tmp_path: Path) -> None:
    """SimSiam's batch norms see the whole batch; where they do not, its losses are others."""
    recipe = "simsiam_smoke"
    expected = engine(photos, tmp_path / "one", "--train.steps=4", recipe=recipe)
    losses = {
        together: example(
            "with_lightning.py",
            photos,
            "--train.steps=4",
            f"--recipe={recipe}",
            "--devices=2",
            f"--train.sync_batch_norm={together}",
            f"--output={tmp_path / together}",
        )
        for together in ("true", "false")
    }
    # cosines of a mean of 0: rounding is relative to 1
    np.testing.assert_allclose(losses["true"], expected, rtol=0, atol=1e-5)
    assert np.abs(np.subtract(losses["false"], expected)).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("plain_pytorch.py", [], "data.path is not set: the folder of your images"),
        ("plain_pytorch.py", ["/nowhere"], "data.path=/nowhere: no such file or folder"),
        pytest.param(
            "with_lightning.py",
            ["/nowhere"],
            "data.path=/nowhere: no such file or folder",
            marks=needs_lightning,
        ),
    ],
)
def test_what_cannot_run_is_one_line(name: str, arguments: list[str], message: str) -> None:
    result = finish(str(ROOT / "examples" / name), *arguments)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in result.stderr
