"""Checkpoints are whole or absent, checked, pruned, and restored bit for bit."""

import copy
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from observed_disk import ObservedDisk, open_descriptors
from simmim import load_model
from simmim.training import checkpoint
from simmim.training.checkpoint import CheckpointError
from simmim.training.step import TrainState, train_step
from small_run import make_batch, make_state, weights


@pytest.fixture(scope="module")
def after_three_steps() -> TrainState:
    """The first of them was skipped."""
    state = make_state("--train.precision=fp16")
    loss_of = state.loss_of
    state.loss_of = lambda *given: loss_of(*given) * float("nan")
    train_step(state, [make_batch(0, 4)])
    state.loss_of = loss_of
    for step in (1, 2):
        train_step(state, [make_batch(0, 4, step)])
    return state


@pytest.fixture
def trained(after_three_steps: TrainState) -> TrainState:
    return copy.deepcopy(after_three_steps)


def save(root: Path, state: TrainState) -> Path:
    return checkpoint.save(root, state, {"config": {}, "data": {}})


def test_round_trip_is_bitwise(trained: TrainState, tmp_path: Path) -> None:
    folder = save(tmp_path, trained)
    assert folder.name == "step_00000003"
    other = make_state("--train.precision=fp16", "--seed=5", "--train.channels_last=true")
    checkpoint.restore(other, checkpoint.read(folder))
    assert other.step == 3
    assert all(torch.equal(weights(trained)[k], v) for k, v in weights(other).items())
    assert other.loss_scale.state() == {"scale": 2.0**15, "good_steps": 2.0}
    assert int(other.skipped) == 1
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


PARTS = ["average.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    trained: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of it, then the folder that lists them, then the renaming."""
    trained.averaged = copy.deepcopy(trained.model)
    disk = ObservedDisk(monkeypatch, tmp_path)
    before = open_descriptors()
    folder = save(tmp_path, trained)
    temporary = f".step_00000003.tmp-{os.getpid()}"
    assert sorted(disk.calls[:4]) == [f"flush {temporary}/{name}" for name in PARTS]
    assert disk.calls[4:] == [
        f"flush {temporary}",
        f"rename {temporary} to step_00000003",
        "flush .",
    ]
    for name in PARTS:
        assert disk.flushed[f"{temporary}/{name}"] == (folder / name).read_bytes()
    assert open_descriptors() == before


@pytest.mark.parametrize("call", range(5))
def test_a_failed_write_leaves_no_trace(
    trained: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Whichever flush fails, or the renaming."""
    save(tmp_path, trained)
    before = sorted(tmp_path.rglob("*"))
    trained.step = 4
    disk = ObservedDisk(monkeypatch, tmp_path)
    disk.fail_at = call
    with pytest.raises(CheckpointError, match="step_00000004: could not be written: No space left"):
        save(tmp_path, trained)
    assert len(disk.calls) == call + 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_written_again(trained: TrainState, tmp_path: Path) -> None:
    """Resuming passed it over, and the run comes to its step once more."""
    folder = save(tmp_path, trained)
    (folder / "optimizer.safetensors").write_bytes(b"")
    (folder / "other").touch()
    assert save(tmp_path, trained) == folder
    assert checkpoint.read(folder).state["step"] == 3
    assert not (folder / "other").exists()


def test_a_full_disk_for_real(trained: TrainState) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    from simmim.files import write_text

    with pytest.raises(OSError, match=r"No space left|Permission|Read-only|Invalid"):
        full.write_text("x" * 100_000)
    with pytest.raises(OSError):
        write_text(Path("/proc/simmim/x"), "x")


def test_the_average_comes_back(trained: TrainState, tmp_path: Path) -> None:
    trained.averaged = copy.deepcopy(trained.model)
    with torch.no_grad():
        for parameter in trained.averaged.parameters():
            parameter.fill_(0.25)
    loaded = checkpoint.read(save(tmp_path, trained))
    other = make_state("--train.precision=fp16", "--seed=5")
    other.averaged = copy.deepcopy(other.model)
    checkpoint.restore(other, loaded)
    assert all(torch.all(parameter == 0.25) for parameter in other.averaged.parameters())
    assert all(torch.equal(weights(trained)[k], v) for k, v in weights(other).items())


def test_a_run_that_begins_to_average_begins_at_its_weights(
    trained: TrainState, tmp_path: Path
) -> None:
    loaded = checkpoint.read(save(tmp_path, trained))
    assert loaded.average == {}
    other = make_state("--train.precision=fp16", "--seed=5")
    other.averaged = copy.deepcopy(other.model)
    checkpoint.restore(other, loaded)
    averaged = other.averaged.state_dict()
    assert all(torch.equal(averaged[k], v) for k, v in weights(trained).items())


def make_empty(root: Path, steps: Iterable[int]) -> None:
    """Folders with the names of checkpoints."""
    for step in steps:
        (root / f"step_{step:08d}").mkdir()


@settings(max_examples=30, deadline=None)
@given(
    kept=st.sets(st.integers(1, 40), max_size=8),
    keep_last=st.integers(1, 5),
    every=st.integers(0, 6),
)
def test_pruning_keeps_the_newest_and_the_milestones_and_no_other(
    kept: set[int], keep_last: int, every: int
) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_empty(root, kept)
        removed = checkpoint.prune(root, keep_last, every)
        newest = sorted(kept)[-keep_last:]
        milestones = {step for step in kept if every and step % every == 0}
        left = sorted({*newest, *milestones})
        assert list(checkpoint.steps(root)) == left
        assert sorted(path.name for path in root.iterdir()) == [f"step_{n:08d}" for n in left]
        gone = sorted(kept - set(left))
        assert [path.name for path in removed] == [f"step_{n:08d}" for n in gone]


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(
    trained: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, trained)
    trained.step = 4
    save(tmp_path, trained)

    def killed(path: Path, **_: object) -> None:
        if Path(path).exists():
            (Path(path) / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, keep_last=1, keep_every_steps=0)
    assert not first.exists()
    assert list(checkpoint.steps(tmp_path)) == [4]
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_prune_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    make_empty(tmp_path, range(1, 9))
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
