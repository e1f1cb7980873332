"""What only CUDA takes part in, host-run: over the stand-in for CUDA every launch does nothing.

Crashes, launches, reads, waits, allocations and what a graph may hold are real; values are not.
    make test-cuda-host
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_sim.cuda_host import convolutions, golden
from gpu_sim.cuda_host.stand_in import VARIABLE, Counts, environment
from simmim.command_line import load
from simmim.data.batch import Batch
from simmim.distributed import World
from simmim.errors import ConfigError
from simmim.pretrain import build_state
from simmim.training.graphed_steps import GraphedSteps
from simmim.training.step import TrainState, train_step
from simmim_kernels import residual_mlp
from simmim_kernels.transformer_block import triton_rows
from small_run import make_batch

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason="not over the stand-in for CUDA: make test-cuda-host"
)
ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tests" / "gpu_sim" / "cuda_host" / "command.py"
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
CUDA = torch.device("cuda", 0)
NOTHING = ("reads", "synchronisations", "allocations", "illegal_in_capture", "beside_capture")


@pytest.fixture(scope="module", autouse=True)
def _convolutions() -> Iterator[None]:
    installed = convolutions.install()
    yield
    del installed


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images in two classes, twice."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(8):
                pixels = draw.integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def arguments_of(recipe: str, images: Path) -> list[str]:
    content = tomllib.loads((ROOT / "configs" / f"{recipe}.toml").read_text())
    flags = [f"--data.path={images / 'train'}", "--device=cuda", "--train.batch_size=8"]
    if recipe.startswith("finetune"):
        flags += [f"--data.val_path={images / 'val'}"]
        if "name" not in content.get("model", {}):
            flags += ["--model.name=vit_tiny"]
        return ["finetune", recipe, *flags]
    if content.get("method", {}).get("name") == "simsiam":
        flags += ["--log.picture_every_steps=-1"]  # neighbours without values have no indices
    return ["pretrain", recipe, *flags]


def run(*arguments: str, **given: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMMAND), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done


def steps_of(output: Path) -> list[int]:
    rows = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["step"] for row in rows]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe: str, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(*arguments_of(recipe, images), f"--output={output}", "--train.steps=5")
    assert steps_of(output) == [1, 2, 3, 4, 5]
    log = (output / "log.txt").read_text()
    mixes = recipe.startswith("finetune") and "mixup and CutMix" in log
    assert mixes or "train.cuda_graph: on after 3 steps" in log
    assert "could not be captured" not in log
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.precision=fp16"],
        ["--train.precision=bf16", "--train.accumulation_steps=2"],
        ["--train.activation_checkpointing=true", "--model.drop_path=0.3"],
        ["--train.channels_last=false"],
        ["--train.cuda_graph=off"],
        ["--train.cuda_graph=on", "--train.clip_norm=0"],
        ["--kernels.backend=reference"],
        ["--data.workers=0"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("recipe", ["smoke", "simsiam_smoke", "tokens_smoke"])
def test_options_train_and_resume(
    recipe: str, flags: list[str], images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    common = [*arguments_of(recipe, images), f"--output={output}", *flags]
    run(*common, "--train.steps=5", "--checkpoint.every_steps=2")
    run(*common, "--train.steps=10")
    assert steps_of(output) == list(range(1, 11))
    log = (output / "log.txt").read_text()
    assert "resumed from" in log
    expected = "off" if "--train.cuda_graph=off" in flags else "on after 3 steps"
    assert log.count(f"train.cuda_graph: {expected}") == 2
    assert "could not be captured" not in log


def test_two_processes_share_gradients_by_nccl_and_capture_them(
    images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    flags = [f"--output={output}", "--train.steps=15", "--log.every_steps=1"]
    command = [*launcher, str(COMMAND), *arguments_of("smoke", images), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment(devices=2)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "UserWarning" not in done.stderr
    log = (output / "log.txt").read_text()
    assert "train.cuda_graph: on after 11 steps" in log
    assert "could not be captured" not in log
    assert steps_of(output) == list(range(1, 16))


def state_of(*flags: str) -> TrainState:
    config = load(["smoke", "--data.path=x", "--device=cuda", "--train.precision=bf16", *flags])
    return build_state(config, 100, World(0, 1, CUDA))


def on_cuda(batch: Batch) -> Batch:
    return Batch(batch.image.cuda(), batch.ids.cuda(), batch.epochs.cuda(), batch.num_valid)


def spent(counts: Counts, call: Any) -> dict[str, int]:
    before = counts.read()
    call()
    after = counts.read()
    return {name: after[name] - before[name] for name in after}


def test_a_step_from_a_graph_is_one_launch_between_copies() -> None:
    counts, told = Counts(), list[str]()
    state = state_of("--train.accumulation_steps=2", "--train.cuda_graph=on")
    make_step = GraphedSteps(state, told.append)
    batches = [on_cuda(make_batch(i, 4)) for i in (0, 4)]
    for _ in range(3):
        make_step(batches)
    first = spent(counts, lambda: make_step(batches))
    assert first["captured_triton"] > 50
    assert first["captured_products"] > 20
    assert first["illegal_in_capture"] == first["beside_capture"] == 0
    for _ in range(2):
        later = spent(counts, lambda: make_step(batches))
        assert later["graph_launches"] == 1
        assert later["triton"] == later["products"] == later["fills"] == 0
        assert later["torch"] == 1  # finite, from the metrics
        assert later["copies"] == 2 * 3 + 2 + 1  # micro-batches, numbers of the step, metrics
        assert {name: later[name] for name in NOTHING} == dict.fromkeys(NOTHING, 0)
    assert state.step == 6
    assert told == []


def test_an_incomplete_step_is_made_without_the_graph_and_another_shape_with_a_new_one() -> None:
    counts, state = Counts(), state_of()
    make_step = GraphedSteps(state, print)
    whole, small = on_cuda(make_batch(0, 8)), on_cuda(make_batch(0, 6))
    for _ in range(4):
        make_step([whole])
    part = Batch(whole.image, whole.ids, whole.epochs, 7)
    assert spent(counts, lambda: make_step([part]))["graph_launches"] == 0
    assert spent(counts, lambda: make_step([whole]))["captured_triton"] == 0
    assert spent(counts, lambda: make_step([small]))["captured_triton"] > 0
    again = spent(counts, lambda: make_step([small]))
    assert (again["graph_launches"], again["captured_triton"]) == (1, 0)
    assert state.step == 8


@pytest.mark.parametrize("choice", ["auto", "on"])
def test_a_step_that_cannot_be_captured_is_made_without(choice: str) -> None:
    state, told = state_of(f"--train.cuda_graph={choice}"), list[str]()
    loss_of = state.loss_of

    def reading(*given: Any) -> Any:
        loss = loss_of(*given)
        loss.item()
        return loss

    state.loss_of = reading
    make_step = GraphedSteps(state, told.append)
    batch = on_cuda(make_batch(0, 8))
    for _ in range(3):
        make_step([batch])
    if choice == "on":
        with pytest.raises(ConfigError, match=r"train\.cuda_graph=on: it could not be captured"):
            make_step([batch])
        return
    for _ in range(2):
        make_step([batch])
    assert state.step == 5
    (line,) = told
    assert line.startswith("train.cuda_graph: off, it could not be captured: ")


def test_compiled_steps_are_refused_where_they_are_slower() -> None:
    with pytest.raises(ConfigError, match="the blocks of swin are fused kernels"):
        state_of("--train.compile=true")
    state_of("--train.compile=true", "--kernels.backend=reference")


def test_a_step_waits_for_nothing_and_takes_no_memory_after_the_first() -> None:
    counts = Counts()
    for flags in ((), ("--train.precision=fp16",), ("--model.drop_path=0.3",)):
        state = state_of(*flags)
        batch = on_cuda(make_batch(0, 8))
        for _ in range(3):
            train_step(state, [batch])
        later = spent(counts, lambda: train_step(state, [batch]))  # noqa: B023
        assert {name: later[name] for name in NOTHING} == dict.fromkeys(NOTHING, 0), flags


def test_ops_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda", 1)
    x, weight = torch.zeros(2, 8, 16, device=there), torch.zeros(16, device=there)
    wide, narrow = torch.zeros(32, 16, device=there), torch.zeros(16, 32, device=there)
    seen: list[tuple[int, int]] = []
    real = torch._C._cuda_getCurrentRawStream

    def noted(device: int) -> int:
        seen.append((device, torch.cuda.current_device()))
        return real(device)

    for _ in range(2):  # the first launch of a kernel is Triton's
        out = residual_mlp(x, weight, weight, wide, torch.zeros(32, device=there), narrow, weight)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", noted)
    assert out.device == there
    assert torch.cuda.current_device() == 0
    assert seen
    assert set(seen) == {(1, 1)}


def test_a_launch_is_remembered_by_all_that_it_was_compiled_for() -> None:
    known = triton_rows._gelu._launches
    known.clear()

    def gelu(rows: int, width: int, dtype: torch.dtype) -> int:
        hidden = torch.zeros(rows, width, device=CUDA, dtype=dtype)
        triton_rows.gelu(hidden, torch.zeros(width, device=CUDA))
        return len(known)

    assert gelu(64, 128, torch.bfloat16) == 1
    assert gelu(64, 128, torch.bfloat16) == 1
    assert gelu(32, 128, torch.bfloat16) == 2
    assert gelu(64, 256, torch.bfloat16) == 3
    assert gelu(64, 128, torch.float32) == 4
    unaligned = torch.zeros(64 * 128 + 1, device=CUDA, dtype=torch.bfloat16)[1:].view(64, 128)
    triton_rows.gelu(unaligned, torch.zeros(128, device=CUDA))
    assert len(known) == 4  # such a launch is Triton's own


@pytest.mark.parametrize("name", golden.MODELS)
def test_launches_and_memory_of_a_step_are_those_on_record(name: str) -> None:
    """`python tests/gpu_sim/cuda_host/golden.py` writes the record."""
    expected, found = golden.read()[name], golden.measure(name)
    peak, known = found.pop("peak_bytes"), expected.pop("peak_bytes")
    assert found == expected
    assert peak == pytest.approx(known, rel=0.02)
