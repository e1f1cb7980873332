"""Whole runs of the command: killed, stopped, damaged, in two processes, on broken data."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import forked_command
import held_command
import simmim
from forked_command import ROOT, Started, finish

ENVIRONMENT = os.environ | forked_command.ENVIRONMENT
COMMAND = [sys.executable, "-m", "simmim"]


def simmim_command(
    *arguments: str, launcher: list[str] | None = None
) -> subprocess.CompletedProcess:
    """To its end; without a launcher in a fork, which starts faster."""
    if launcher is None:
        return finish("simmim", *arguments)
    return subprocess.run(
        [*launcher, *arguments],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def flags(photos: Path, output: Path, *more: str) -> list[str]:
    return [
        "pretrain",
        "configs/smoke.toml",
        f"--data.path={photos}",
        f"--output={output}",
        "--seed=11",
        *more,
    ]


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in metrics(output)]


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    result = simmim_command(
        *flags(photos, output, "--checkpoint.every_steps=7", "--train.steps=24"), launcher=COMMAND
    )
    assert result.returncode == 0, result.stderr
    return output


def test_a_run_leaves_everything_behind(straight: Path, photos: Path) -> None:
    names = {p.name for p in straight.iterdir()}
    assert names >= {
        "checkpoints", "pictures", "metrics.jsonl", "log.txt", "config.toml", "run.json",
        "model.safetensors",
    }  # fmt: skip
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == [
        "step_00000014",
        "step_00000021",
        "step_00000024",
    ]
    rows = metrics(straight)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert np.mean(losses(straight)[-5:]) < np.mean(losses(straight)[:5])
    keys = {"loss", "lr", "grad_norm", "images_per_s", "data_wait", "peak_memory_bytes", "eta_s"}
    assert all(keys <= row.keys() for row in rows)
    log = (straight / "log.txt").read_text()
    for word in ("epoch", "step 24/24", "loss", "lr", "grad", "img/s", "data-wait", "mem", "eta"):
        assert word in log
    with Image.open(straight / "pictures" / "step_00000024.png") as picture:
        assert np.asarray(picture).std() > 20
    start = json.loads((straight / "run.json").read_text())["starts"][0]
    assert start["versions"]["torch"] == torch.__version__
    assert start["device"] == "cpu"
    model = simmim.load_model(straight)
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 8, 8)


def test_killed_runs_end_bitwise_equal(straight: Path, photos: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, again and again, until a start gets through to the end."""
    output = tmp_path / "killed"
    arguments = flags(
        photos, output, "--checkpoint.every_steps=7", "--train.steps=24", "--log.every_steps=1"
    )
    generator = random.Random(3)
    held = held_command.environment(20, tmp_path / "never")
    for _ in range(4):
        before = len(losses(output)) if (output / "metrics.jsonl").exists() else 0
        process = Started(held_command.PATH, *arguments, environment=held)
        _wait_for_rows(output, min(before + generator.randint(1, 6), 20), process)
        time.sleep(generator.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    # the last start is the command itself
    result = simmim_command(*arguments, launcher=COMMAND)
    assert result.returncode == 0, result.stderr
    assert same_weights(output, straight)
    assert losses(output) == losses(straight)
    assert [row["step"] for row in metrics(output)] == list(range(1, 25))


def _wait_for_rows(output: Path, count: int, process: subprocess.Popen | Started) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        path = output / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_run_goes_on(
    straight: Path, photos: Path, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    """To the process as `kill` sends it, to the group as a terminal and a scheduler do."""
    output = tmp_path / "stopped"
    arguments = flags(
        photos, output, "--checkpoint.every_steps=7", "--train.steps=24", "--log.every_steps=1"
    )
    go_on = tmp_path / "go-on"
    held = held_command.environment(20, go_on)
    process = Started(held_command.PATH, *arguments, environment=held)
    _wait_for_rows(output, 3, process)
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    go_on.touch()
    _, error = process.communicate(timeout=600)
    assert process.returncode == 75, error
    assert f"stopped by {number.name}: saved at step" in error
    assert "Traceback" not in error
    stopped = metrics(output)[-1]["step"]
    assert 3 <= stopped < 24
    assert (output / "checkpoints" / f"step_{stopped:08d}" / "state.json").is_file()
    again = simmim_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"at step {stopped}" in again.stderr
    assert same_weights(output, straight)


def test_a_damaged_newest_checkpoint_is_passed_over(
    straight: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "damaged"
    first = simmim_command(*flags(photos, output, "--checkpoint.every_steps=7", "--train.steps=14"))
    assert first.returncode == 0, first.stderr
    os.truncate(output / "checkpoints" / "step_00000014" / "optimizer.safetensors", 100)
    result = simmim_command(
        *flags(photos, output, "--checkpoint.every_steps=7", "--train.steps=24")
    )
    assert result.returncode == 0, result.stderr
    assert "warning: checkpoint passed over" in result.stderr
    assert "resumed from" in result.stderr
    assert "at step 7" in result.stderr
    # the schedule's length differs until step 14, so only the plan is compared, not the weights
    assert [row["step"] for row in metrics(output)] == list(range(1, 25))


def test_a_signal_that_comes_twice_still_saves(photos: Path, tmp_path: Path) -> None:
    """Launchers and schedulers may deliver the same SIGTERM twice within milliseconds."""
    arguments = flags(photos, tmp_path / "run", "--train.steps=100000", "--log.every_steps=1")
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    _wait_for_rows(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 75, error
    assert "saved at step" in error


def test_a_checkpoint_that_cannot_be_written_ends_the_run(photos: Path, tmp_path: Path) -> None:
    """With one line and at once: no worker keeps the process waiting."""
    output = tmp_path / "run"
    output.mkdir()
    (output / ".lock").touch()
    (output / "checkpoints").write_text("a file in the way")
    result = simmim_command(*flags(photos, output))
    assert result.returncode == 1
    assert "checkpoints" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("--seed=12", "seed was 11"),
        ("--train.batch_size=4", "train.batch_size was 8"),
        ("--optim.name=sgd", "optim.name was adamw"),
        ("--model.embed_dim=32", "model.embed_dim was 16"),
    ],
)
def test_what_a_run_cannot_change_midway(
    straight: Path, photos: Path, change: str, key: str
) -> None:
    result = simmim_command(*flags(photos, straight, "--train.steps=30", change))
    assert result.returncode == 2
    assert key in result.stderr
    assert "choose another --output" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_finished_run_is_never_rewritten(straight: Path, photos: Path, tmp_path: Path) -> None:
    """Neither other data, another size, nor lost checkpoints may replace what it holds."""
    output, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    shutil.copy(min(photos.iterdir()), other)
    assert simmim_command(*flags(photos, output, "--train.steps=4")).returncode == 0
    watched = [
        output / n for n in ("model.safetensors", "metrics.jsonl", "config.toml", "run.json")
    ]
    before = [path.read_bytes() for path in watched]
    for arguments, code, message in (
        (flags(other, output, "--train.steps=4"), 2, "not the images of the run"),
        (
            flags(photos, output, "--train.steps=4", "--data.image_size=32"),
            2,
            "data.image_size was",
        ),
        (flags(photos, output, "--train.steps=3"), 0, "already done: 4 steps"),
    ):
        result = simmim_command(*arguments)
        assert (result.returncode, message in result.stderr) == (code, True), result.stderr
        assert [path.read_bytes() for path in watched] == before
    shutil.rmtree(output / "checkpoints")
    result = simmim_command(*flags(photos, output, "--train.steps=8"))
    assert result.returncode == 1
    assert "choose another --output" in result.stderr
    assert [path.read_bytes() for path in watched] == before


def test_a_killed_worker_is_replaced(straight: Path, photos: Path, tmp_path: Path) -> None:
    """One line says so, and the run ends with the weights of an undisturbed one."""
    arguments = flags(
        photos, tmp_path / "run", "--checkpoint.every_steps=7", "--train.steps=24",
        "--log.every_steps=1", "--data.prefetch=1",
    )  # fmt: skip
    go_on = tmp_path / "go-on"
    held = held_command.environment(10, go_on)
    process = Started(held_command.PATH, *arguments, environment=held)
    _wait_for_rows(tmp_path / "run", 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    go_on.touch()
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert error.count("a data worker was killed by SIGKILL") == 1
    assert "Traceback" not in error
    assert same_weights(tmp_path / "run", straight)


def test_data_that_is_gone_does_not_cost_the_save(photos: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)
    arguments = flags(
        folder, output, "--train.steps=100000", "--log.every_steps=1",
        "--checkpoint.every_steps=90000",
    )  # fmt: skip
    process = Started("simmim", *arguments)
    _wait_for_rows(output, 3, process)
    shutil.rmtree(folder)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 1, error
    assert "is the disk still there?" in error
    assert "Traceback" not in error
    last = metrics(output)[-1]["step"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step_{last:08d}"]


def test_dali_sees_the_same_crops(straight: Path, photos: Path, tmp_path: Path) -> None:
    """From packed shards of the same bytes: the losses of the CPU path, but for rounding."""
    pytest.importorskip("nvidia.dali")
    packed = tmp_path / "packed"
    assert simmim_command("pack", str(photos), str(packed), "--keep-originals").returncode == 0
    output = tmp_path / "run"
    result = simmim_command(
        *flags(packed, output, "--train.steps=24", "--data.backend=dali", "--log.every_steps=4")
    )
    assert result.returncode == 0, result.stderr
    assert "data.backend: dali (DALI" in result.stderr
    assert losses(output) == pytest.approx(losses(straight), abs=5e-3)


def test_a_signal_while_data_hangs_still_saves(photos: Path, tmp_path: Path) -> None:
    """A worker that is stuck in a read, as on a dead file server, must not cost the save."""
    arguments = flags(
        photos, tmp_path / "run", "--train.steps=100000", "--log.every_steps=1",
        "--checkpoint.every_steps=90000",
    )  # fmt: skip
    process = Started("simmim", *arguments)
    _wait_for_rows(tmp_path / "run", 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGSTOP)
    rows = -1
    while rows != len(metrics(tmp_path / "run")):  # what was prefetched is used up
        rows = len(metrics(tmp_path / "run"))
        time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 75, error
    rows = len(metrics(tmp_path / "run"))
    assert f"saved at step {rows}" in error
    assert "Traceback" not in error


def test_a_run_made_shorter_is_done(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert simmim_command(*flags(photos, output, "--train.steps=6")).returncode == 0
    result = simmim_command(*flags(photos, output, "--train.steps=3"))
    assert result.returncode == 0, result.stderr
    assert "done" in result.stderr


def test_a_finished_run_is_left_alone(straight: Path, photos: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    result = simmim_command(
        *flags(photos, straight, "--checkpoint.every_steps=7", "--train.steps=24")
    )
    assert result.returncode == 0
    assert (straight / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(
    straight: Path, photos: Path, tmp_path: Path, accumulation: int
) -> None:
    """The same global batch over two gloo processes: losses and gradients of one process.

    AdamW's steps do not depend on the size of gradients, so losses alone would not tell.
    """
    output = tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--standalone", "-m", "simmim"]
    result = simmim_command(
        *flags(
            photos,
            output,
            "--checkpoint.every_steps=7",
            "--train.steps=24",
            f"--train.accumulation_steps={accumulation}",
        ),
        launcher=launcher,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(losses(output), losses(straight), rtol=1e-5)
    norms = [[row["grad_norm"] for row in metrics(folder)] for folder in (output, straight)]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    assert [row["lr"] for row in metrics(output)] == [row["lr"] for row in metrics(straight)]


def test_broken_images_never_end_the_run(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.iterdir())[:12]):
        data = path.read_bytes()
        broken = {1: b"", 5: data[: len(data) // 3], 7: b"not an image"}.get(number, data)
        (folder / f"{number:02d}{path.suffix}").write_bytes(broken)
    result = simmim_command(*flags(folder, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    for name in ("01", "05", "07"):
        assert log.count(f"unreadable: {name}.") == 1
    assert metrics(tmp_path / "run")[-1]["unreadable"] == 3
    assert "unreadable 3" in log


def test_non_finite_steps_stop_the_run(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = simmim_command(*flags(photos, output, "--train.steps=10"))
    assert first.returncode == 0, first.stderr
    result = simmim_command(
        *flags(photos, output, "--optim.lr=1e30", "--train.clip_norm=0", "--train.max_bad_steps=4")
    )
    assert result.returncode == 1
    assert "4 steps in a row had a non-finite loss" in result.stderr
    assert "the checkpoint of step" in result.stderr
    assert "Traceback" not in result.stderr
    assert simmim.load_model(output / "checkpoints" / "step_00000010") is not None
    assert any(row["loss"] is None for row in metrics(output))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "smoke", "--train.stps=3"], 2, "did you mean train.steps?"),
        (["pretrain", "smoke", "--data.path=/nowhere"], 2, "/nowhere: no such file or folder"),
        (["pretrain", "smoke"], 2, "data.path is not set"),
        (["pretrain"], 2, "CONFIG is missing"),
        (["pretrain", "smoke", "--data.path=.", "--output=configs"], 2, "holds no simmim run"),
        (["pretrain", "smoke", "--data.path=.", "--device=cuda"], 1, "no CUDA device"),
        (["train"], 2, "unknown command train"),
        (["pretrain", "smoke", "--data.path=.", "--optim.betas=[0.9,1.5]"], 2, "optim.betas=1.5"),
        (["pretrain", "smoke", "--data.path=.", "--model.window_size=0"], 2, "model.window_size=0"),
        (["pretrain", "smoke", "--data.path=.", "--model.depths=[]"], 2, "model.depths=()"),
        ([], 2, ""),
        (["reconstruct", "nowhere.pth", "x.jpg"], 2, "nowhere.pth: no such file"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    if "pretrain" in arguments and not any("--output" in a for a in arguments):
        arguments = [*arguments, *([f"--output={tmp_path / 'x'}"] if len(arguments) > 1 else [])]
    result = simmim_command(*arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert result.stderr.count("\n") <= 1
    if "--device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")


def test_a_killed_run_leaves_its_folder_free(photos: Path, tmp_path: Path) -> None:
    """Workers live on for seconds after a SIGKILL of their parent; the restart must not wait."""
    arguments = flags(photos, tmp_path / "run", "--train.steps=100000", "--log.every_steps=1")
    process = Started("simmim", *arguments)
    _wait_for_rows(tmp_path / "run", 1, process)
    process.kill()
    process.wait()
    result = simmim_command(*flags(photos, tmp_path / "run", "--train.steps=2"))
    assert result.returncode == 0, result.stderr


def test_two_runs_do_not_share_a_folder(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = Started("simmim", *flags(photos, output, "--train.steps=100000"))
    try:
        _wait_for_rows(output, 1, process)
        result = simmim_command(*flags(photos, output))
        assert result.returncode == 2
        assert "another process is training in this folder" in result.stderr
    finally:
        process.kill()
        process.wait()


def test_reconstruct_and_doctor_and_recipes(straight: Path, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    photo = str(min(photos.iterdir()))
    arguments = ["reconstruct", str(straight), photo, f"--output={picture}"]
    result = simmim_command(*arguments)
    assert result.returncode == 0, result.stderr
    with Image.open(picture) as image:
        assert image.width > 3 * 64
    refused = simmim_command(*arguments)
    assert refused.returncode == 2
    assert "exists" in refused.stderr
    doctor = simmim_command("doctor")
    assert doctor.returncode == 0
    for word in ("torch", "substitute_mask_tokens", "cuda", "native CPU kernels"):
        assert word in doctor.stdout
    assert "swin_base_192_100ep" in simmim_command("recipes").stdout


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the reader leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tensorboard(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    result = simmim_command(*flags(photos, tmp_path / "run", "--log.tensorboard=true"))
    assert result.returncode == 0, result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 20
    assert events.Tags()["images"] == ["reconstruction"]
    del events
    gc.collect()


def test_precisions_and_options_train(photos: Path, tmp_path: Path) -> None:
    for number, extra in enumerate(
        (
            ["--train.precision=bf16", "--train.activation_checkpointing=true"],
            ["--train.precision=fp16", "--train.channels_last=true"],
            ["--data.channels=1", "--model.drop_path=0.1", "--data.image_size=[64,128]"],
            ["--model.name=vit_tiny", "--model.depths=[1]", "--model.num_heads=[2]"],
        )
    ):
        arguments = flags(photos, tmp_path / str(number), "--train.steps=4", *extra)
        if "--model.name=vit_tiny" in extra:
            config = (ROOT / "configs" / "smoke.toml").read_text().replace("window_size = 4\n", "")
            (tmp_path / "vit.toml").write_text(config)
            arguments[1] = str(tmp_path / "vit.toml")
        result = simmim_command(*arguments)
        assert result.returncode == 0, result.stderr
        assert all(loss is not None for loss in losses(tmp_path / str(number)))


@pytest.mark.slow
def test_torch_compile_trains_the_same(straight: Path, photos: Path, tmp_path: Path) -> None:
    arguments = flags(
        photos, tmp_path / "run", "--train.compile=true", "--train.steps=24",
        "--checkpoint.every_steps=7",
    )  # fmt: skip
    result = simmim_command(*arguments)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(straight), rtol=1e-4)
