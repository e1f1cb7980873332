"""Resuming from a checkpoint: which settings may change, which must not, and what the log says."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from simmim.command_line import load
from simmim.config.sections import Config
from simmim.errors import ConfigError
from simmim.training.checkpoint import Loaded
from simmim.training.resume import changes_since

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
