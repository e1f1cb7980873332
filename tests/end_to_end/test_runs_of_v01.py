"""Runs that an earlier version stopped midway go on: tests/golden/runs_of_v0.1."""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import cli
from simmim.downstream import finetune

RUNS = Path(__file__).parents[1] / "golden" / "runs_of_v0.1"
COMMON = [
    "--seed=5", "--device=cpu", "--data.workers=0", "--train.precision=float32", "--train.steps=6",
    "--train.batch_size=6", "--checkpoint.every_steps=3", "--checkpoint.keep_last=1",
]  # fmt: skip
PRETRAIN = [*COMMON, "--data.image_size=32", "--log.picture_every_steps=-1"]
SWIN = ["--model.embed_dim=8", "--model.num_heads=[1, 2]", "--model.depths=[1, 1]"]
ARGUMENTS = {
    "simmim": ["pretrain", "smoke", *PRETRAIN, *SWIN],
    "tokens": ["pretrain", "tokens_smoke", *PRETRAIN, "--model.embed_dim=16", "--model.depths=[1]"],
    "simsiam": ["pretrain", "simsiam_smoke", *PRETRAIN, *SWIN],
    "finetune": ["finetune", "finetune_smoke", *COMMON, "--pretrained=whole/simmim",
                 "--train.ema_decay=0.9"],
}  # fmt: skip


def write_images(folder: Path) -> None:
    """Waves of other colours and directions: two classes for training and for validation."""
    y, x = np.mgrid[:40, :48]
    for number in range(16):
        part, name = ("train", "val")[number // 10], ("a", "b")[number % 2]
        waves = [
            (3 + c) * (1 + number % 3) * x + (5 + number) * (1 + number % 2 * c) * y
            for c in range(3)
        ]
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        pixels = (np.stack(waves, 2) + 40 * number) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number:02d}.png")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images where the runs had them: in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"))


def rows(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_run_of_v01_goes_on(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is that of the unbroken run of then.

    Losses are near 1, or are cosines: in float32 another processor's sums round them by some 1e-7,
    and three updates enlarge that tenfold at most. A wrong moment, learning rate, crop or mask
    shows from the third digit on.
    """
    # v0.1 drew stochastic depth from torch's generator, and each process its own
    monkeypatch.setattr(finetune, "of_samples", lambda *samples: nullcontext())
    output = Path("stopped") / name
    shutil.copytree(RUNS / name, output)
    arguments = [*ARGUMENTS[name], "--data.path=images", f"--output={output}"]
    assert cli.main(arguments) == 0
    assert "at step 3" in capsys.readouterr().err
    expected = json.loads((RUNS / "expected.json").read_text())[name]
    found = rows(output, "metrics")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in found] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    if "evaluations" in expected:
        evaluations = rows(output, "evaluations")
        for now, then in zip(evaluations, expected["evaluations"], strict=True):
            assert now["step"] == then["step"]
            assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)
    assert (output / "model.safetensors").is_file()
