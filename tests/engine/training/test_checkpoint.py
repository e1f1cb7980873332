"""Checkpoints are whole or absent, checked, pruned, and restored bit for bit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from simmim import load_model
from simmim.training import checkpoint
from simmim.training.checkpoint import CheckpointError
from simmim.training.step import TrainState, train_step
from small_run import make_batch, make_state, weights


@pytest.fixture
def trained() -> TrainState:
    state = make_state("--train.precision=fp16")
    for step in range(3):
        train_step(state, [make_batch(0, 4, step)])
    return state


def save(root: Path, state: TrainState) -> Path:
    return checkpoint.save(root, state, {"config": {}, "data": {}})


def test_round_trip_is_bitwise(trained: TrainState, tmp_path: Path) -> None:
    folder = save(tmp_path, trained)
    assert folder.name == "step_00000003"
    other = make_state("--train.precision=fp16", "--seed=5", "--train.channels_last=true")
    checkpoint.restore(other, checkpoint.read(folder))
    assert other.step == 3
    assert all(torch.equal(weights(trained)[k], v) for k, v in weights(other).items())
    assert other.loss_scale.state() == trained.loss_scale.state()
    parameters = zip(trained.parameters(), other.parameters(), strict=True)
    for ours, theirs in parameters:
        for key, value in trained.optimizer.state[ours].items():
            restored = other.optimizer.state[theirs][key]
            assert torch.equal(restored, value)
            if value.shape == ours.shape:
                assert restored.stride() == theirs.stride()


def test_others_can_read_the_weights(trained: TrainState, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = save(tmp_path, trained)
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


@pytest.mark.parametrize(("first", "second"), [("float32", "fp16"), ("fp16", "bf16")])
def test_another_precision_keeps_a_sane_loss_scale(tmp_path: Path, first: str, second: str) -> None:
    state = make_state(f"--train.precision={first}")
    train_step(state, [make_batch(0, 4)])
    other = make_state(f"--train.precision={second}")
    fresh = float(other.loss_scale.scale)
    checkpoint.restore(other, checkpoint.read(save(tmp_path, state)))
    assert float(other.loss_scale.scale) == fresh


def test_the_model_loads_from_its_checkpoint(trained: TrainState, tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", trained)
    model = load_model(tmp_path)
    assert model.encoder.spec == trained.model.encoder.spec
    assert not model.training
    assert all(torch.equal(weights(trained)[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no_state", "bad_state"])
def test_a_damaged_checkpoint_falls_back_loudly(
    trained: TrainState, tmp_path: Path, damage: str
) -> None:
    save(tmp_path, trained)
    train_step(trained, [make_batch(0, 4, 3)])
    newest = save(tmp_path, trained)
    weights_file, state_file = newest / "model.safetensors", newest / "state.json"
    if damage == "truncated":
        os.truncate(weights_file, weights_file.stat().st_size - 10)
    elif damage == "flipped":
        data = bytearray(weights_file.read_bytes())
        data[-1] ^= 1
        weights_file.write_bytes(data)
    elif damage == "missing":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "no_state":
        state_file.unlink()
    else:
        state_file.write_text('{"format": 1')
    warnings: list[str] = []
    loaded = checkpoint.read_newest(tmp_path, warnings.append)
    assert loaded is not None
    assert loaded.state["step"] == 3
    assert len(warnings) == 1
    assert "step_00000004" in warnings[0]
    assert list(checkpoint.steps(tmp_path)) == [3]
    assert (tmp_path / "damaged_step_00000004").is_dir()


def test_all_damaged_is_an_error_and_nothing_is_removed(
    trained: TrainState, tmp_path: Path
) -> None:
    (save(tmp_path, trained) / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        checkpoint.read_newest(tmp_path, lambda message: None)
    assert len(checkpoint.steps(tmp_path)) == 1
    assert checkpoint.read_newest(tmp_path / "nothing", lambda message: None) is None


def test_a_failed_write_leaves_no_trace(
    trained: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, trained)
    before = sorted(tmp_path.rglob("*"))
    train_step(trained, [make_batch(0, 4, 3)])

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full_disk)
    with pytest.raises(CheckpointError, match="step_00000004: could not be written: No space left"):
        save(tmp_path, trained)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_for_real(trained: TrainState) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    from simmim.files import write_text

    with pytest.raises(OSError, match=r"No space left|Permission|Read-only|Invalid"):
        full.write_text("x" * 100_000)
    with pytest.raises(OSError):
        write_text(Path("/proc/simmim/x"), "x")


def test_prune_keeps_the_newest_and_the_milestones(trained: TrainState, tmp_path: Path) -> None:
    for step in range(1, 9):
        trained.step = step
        save(tmp_path, trained)
    removed = checkpoint.prune(tmp_path, keep_last=2, keep_every_steps=3)
    assert [p.name for p in removed] == [f"step_{n:08d}" for n in (1, 2, 4, 5)]
    assert list(checkpoint.steps(tmp_path)) == [3, 6, 7, 8]
    (tmp_path / ".step_00000009.tmp-123").mkdir()
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{n:08d}" for n in (3, 6, 7, 8)]


def test_a_checkpoint_of_another_model(trained: TrainState, tmp_path: Path) -> None:
    folder = save(tmp_path, trained)
    other = make_state("--model.embed_dim=32")
    with pytest.raises(CheckpointError, match=r"does not fit this run's model: .*shape"):
        checkpoint.restore(other, checkpoint.read(folder))


def test_a_checkpoint_of_another_format(trained: TrainState, tmp_path: Path) -> None:
    folder = save(tmp_path, trained)
    state = json.loads((folder / "state.json").read_text())
    state["format"] = 99
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read(folder)
    shutil.rmtree(folder)
