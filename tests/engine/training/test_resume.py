"""Resuming from a checkpoint: which settings may change, which must not, and what the log says."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simmim.command_line import load
from simmim.config.sections import Config
from simmim.distributed import World
from simmim.errors import ConfigError, DataError
from simmim.run_folder import RunFolder
from simmim.training import checkpoint
from simmim.training import resume as resume_module
from simmim.training.checkpoint import CheckpointError, Loaded
from simmim.training.resume import agreed_fingerprint, changes_since, resume
from small_run import CPU, make_state

IMAGES = {"images": 20, "digest": "a"}


def config_of(*flags: str) -> Config:
    return load(["smoke", "--data.path=photos", "--output=runs/x", *flags])


def saved(config: Config, **changes: Any) -> Loaded:
    state = {"config": asdict(config) | changes, "data": IMAGES}
    return Loaded(Path("runs/x/checkpoints/step_00000003"), state, {}, {}, {})


def test_nothing_changed_says_nothing() -> None:
    assert changes_since(saved(config_of()), config_of(), IMAGES) == []
    moved = replace(config_of(), output="elsewhere")  # a folder may be moved
    assert changes_since(saved(config_of()), moved, IMAGES) == []


def test_what_may_change_is_said() -> None:
    changes = changes_since(saved(config_of()), config_of("--optim.lr=0.5"), IMAGES)
    assert len(changes) == 1
    assert changes[0].startswith("changed since the checkpoint: optim.lr ")
    assert changes[0].endswith(" → 0.5")


@pytest.mark.parametrize(
    "flag",
    [
        "--seed=7",
        "--train.batch_size=2",
        "--optim.name=sgd",
        "--data.image_size=32",
        "--data.channels=1",
        "--model.embed_dim=32",
    ],
)
def test_what_the_saved_state_depends_on_must_not_change(flag: str) -> None:
    key, value = flag.removeprefix("--").split("=")
    with pytest.raises(ConfigError, match=rf"{key} was .* is {value} now.*another --output"):
        changes_since(saved(config_of()), config_of(flag), IMAGES)


def test_the_method_must_not_change() -> None:
    with pytest.raises(ConfigError, match=r"method\.name was simsiam .* and is simmim now"):
        changes_since(saved(config_of(), method={"name": "simsiam"}), config_of(), IMAGES)


def test_other_images_under_the_same_path_are_said() -> None:
    (change,) = changes_since(saved(config_of()), config_of(), {"images": 21, "digest": "b"})
    assert "the data changed since the checkpoint (20 → 21 images" in change


def test_other_images_under_another_path_are_another_run() -> None:
    other = config_of("--data.path=others")
    with pytest.raises(ConfigError, match=r"data\.path=others: not the images of the run"):
        changes_since(saved(config_of()), other, {"images": 21, "digest": "b"})


def test_a_configuration_of_another_version_is_not_compared() -> None:
    changes = changes_since(saved(config_of(), unheard_of={"x": 1}), config_of(), IMAGES)
    assert changes == ["the checkpoint's configuration is of another version; not compared"]


class Log:
    def __init__(self) -> None:
        self.lines, self.cut = list[str](), list[int]()
        self.info = self.warn = self.lines.append
        self.start_after = self.cut.append


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path), Log()
    given: Any = log
    first = make_state()
    assert resume(first, folder, IMAGES, given) == set()
    assert log.cut == [0]
    extra = {"config": asdict(first.config), "data": IMAGES, "unreadable": [3, 7]}
    for step in (2, 5):
        first.step = step
        checkpoint.save(folder.checkpoints, first, extra)
    (folder.checkpoints / ".step_00000006.tmp-1").mkdir()
    state = make_state()
    assert resume(state, folder, IMAGES, given) == {3, 7}
    assert (state.step, log.cut) == (5, [0, 5])
    assert "at step 5" in log.lines[-1]
    assert list(folder.checkpoints.iterdir()) != []
    assert not (folder.checkpoints / ".step_00000006.tmp-1").exists()


def test_another_process_takes_the_checkpoint_that_the_first_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = RunFolder(tmp_path), Log()
    given: Any = log
    state = make_state()
    for step in (2, 5):
        state.step = step
        extra = {"config": asdict(state.config), "data": IMAGES}
        checkpoint.save(folder.checkpoints, state, extra)
    other = make_state()
    other.world = World(1, 2, CPU)
    chosen: list[Any] = [(None, folder.checkpoints / "step_00000002"), ("damaged", None)]
    told = iter(chosen)
    monkeypatch.setattr(resume_module.distributed, "broadcast_object", lambda *_: next(told))
    resume(other, folder, IMAGES, given)
    assert other.step == 2
    with pytest.raises(CheckpointError, match="damaged"):
        resume(other, folder, IMAGES, given)


def test_the_weights_of_a_finished_run_are_not_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.weights.touch()
    given: Any = Log()
    with pytest.raises(CheckpointError, match="choose another --output"):
        resume(make_state(), folder, IMAGES, given)


def test_processes_that_see_other_images_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    class Names(list[str]):
        def digest(self) -> str:
            return "a"

    source: Any = SimpleNamespace(names=Names(["x"] * 20))
    assert agreed_fingerprint(source, World(0, 1, CPU)) == IMAGES
    for other in ({"images": 21, "digest": "a"}, {"images": 20, "digest": "b"}):
        values = [IMAGES, other]
        monkeypatch.setattr(resume_module.distributed, "gather_objects", lambda *_: values)  # noqa: B023
        with pytest.raises(DataError, match="process 0 sees 20 images and process 1 sees"):
            agreed_fingerprint(source, World(0, 2, CPU))
