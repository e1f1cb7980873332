"""Values that do not fit together: one clear line each."""

import math
from dataclasses import replace
from typing import Any

import pytest

from simmim.command_line import load
from simmim.config.check import check_mask, check_pretraining, check_training, micro_batch
from simmim.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
)
from simmim.errors import ConfigError
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE, KNOWN_BACKENDS


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.crop_scale=[0.9,0.5]"], "data.crop_scale=[0.9, 0.5] must rise"),
        (["--data.image_size=192", "--mask.unit=40"], "nearest that fits is 32"),
        (
            ["--mask.unit=6"],
            "mask.unit=6 px does not divide images of 64×64 px; nearest that fits is 4",
        ),
        (["--mask.unit=2"], "no multiple of the patch size 4 px; nearest that fits is 4"),
        (["--mask.ratio=0"], "mask.ratio=0.0 must be above 0"),
        (["--mask.ratio=1.5"], "mask.ratio=1.5 must be above 0"),
        (["--data.channels=0"], "data.channels=0 must be at least 1"),
        (["--data.value_range=[9,9]"], "data.value_range=[9.0, 9.0] must rise"),
        (["--data.timeout_s=0"], "data.timeout_s=0.0 must be at least 0.1"),
        (["--data.std=[1,1]"], "data.std has 2 values for 3 channels"),
        (["--train.batch_size=10", "--train.accumulation_steps=4"], "nearest is 8"),
        (["--train.batch_size=0"], "train.batch_size=0 must be at least 1"),
        (
            ["--schedule.name=multistep", "--schedule.milestones=[3]", "--schedule.warmup_steps=0"],
            "begin before the warm-up ends",
        ),
        (["--data.path="], "data.path is not set"),
        (["--log.pictures=0"], "log.pictures=0 must be between 1 and 64"),
        (["--method.norm_target=8"], "method.norm_target=8 must be odd"),
        (["--model.norm_target=1"], "method.norm_target=1 must be odd"),
    ],
)
def test_one_line_for_what_cannot_run(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_batch_is_split_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("--train.batch_size=24", "--train.accumulation_steps=3")
    assert micro_batch(config, 4) == 2
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match="5 processes × 3 accumulation steps; nearest is 30"):
        parse("--train.batch_size=24", "--train.accumulation_steps=3")


def refused(config: Config) -> str:
    """The one line with which a run is refused, whatever it trains."""
    with pytest.raises(ConfigError) as error:
        check_training(config)
    return str(error.value)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_every_number_is_finite(wrong: float) -> None:
    assert refused(Config(schedule=ScheduleConfig(min_lr=wrong))) == (
        f"schedule.min_lr={wrong} must be finite"
    )
    assert refused(Config(data=DataConfig(mean=[0.5, wrong, 0.5]))) == (
        f"data.mean=[0.5, {wrong}, 0.5] must be finite"
    )
    assert refused(Config(data=DataConfig(crop_scale=(0.5, wrong)))) == (
        f"data.crop_scale=(0.5, {wrong}) must be finite"
    )


def test_a_backend_that_the_environment_forces_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    assert refused(Config()) == (
        f"{ENVIRONMENT_VARIABLE}=cuda is unknown; known are {', '.join(KNOWN_BACKENDS)}"
    )
    for known in ("", *KNOWN_BACKENDS):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, known)
        check_training(Config())


@pytest.mark.parametrize("epochs", [0, -1.5])
def test_epochs_count_where_no_steps_are_said(epochs: float) -> None:
    message = f"train.epochs={epochs} must be above 0"
    assert refused(Config(train=TrainConfig(epochs=epochs))) == message
    check_training(Config(train=TrainConfig(epochs=epochs, steps=1)))
    check_training(Config(train=TrainConfig(epochs=0.01)))


def test_bounds_are_checked() -> None:
    assert refused(Config(checkpoint=CheckpointConfig(keep_last=0))) == (
        "checkpoint.keep_last=0 must be at least 1"
    )


@pytest.mark.parametrize("key", ["mean", "std"])
def test_statistics_are_those_of_every_channel(key: str) -> None:
    data = DataConfig(**{key: [0.5, 0.5, 0.5]})
    check_training(Config(data=data))
    wrong = Config(data=replace(data, channels=4))
    assert refused(wrong) == f"data.{key} has 3 values for 4 channels"


def test_milestones_come_after_the_warm_up() -> None:
    schedule = ScheduleConfig(name="multistep", milestones=[12.0, 9.0], warmup_epochs=10)
    assert refused(Config(schedule=schedule)) == (
        "schedule.milestones=[12.0, 9.0] begin before the warm-up ends (schedule.warmup_epochs=10)"
    )
    for fine in (
        replace(schedule, milestones=[12.0, 10.0]),
        replace(schedule, warmup_steps=1),
        replace(schedule, name="step"),
        replace(schedule, milestones=[], warmup_epochs=0),
    ):
        check_training(Config(schedule=fine))


ODD_UNIT = "mask.unit=48 px does not divide images of"


@pytest.mark.parametrize(
    ("size", "unit", "message"),
    [
        ((64, 96), 32, ""),
        (64, 16, ""),
        ((96, 64), 48, f"{ODD_UNIT} 96×64 px; nearest that fits is 32"),
        ((64, 96), 48, f"{ODD_UNIT} 64×96 px; nearest that fits is 32"),
        (64, 20, "mask.unit=20 px does not divide images of 64×64 px; nearest that fits is 16"),
        # 4 and 8 are as near: the smaller
        (64, 6, "mask.unit=6 px does not divide images of 64×64 px; nearest that fits is 4"),
        (64, 2, "mask.unit=2 px is no multiple of the patch size 4 px; nearest that fits is 4"),
        (64, 128, "mask.unit=128 px does not divide images of 64×64 px; nearest that fits is 64"),
    ],
)  # fmt: skip
def test_masks_fit_images_and_patches(size: Any, unit: int, message: str) -> None:
    config = Config(
        model=ModelConfig(name="swin_tiny", depths=[1, 1], num_heads=[1, 2], window_size=2),
        data=DataConfig(image_size=size),
        mask=MaskConfig(unit=unit),
    )
    if not message:
        check_mask(config)
        return
    with pytest.raises(ConfigError) as error:
        check_mask(config)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "parts"),
    [(24, 3, 4, 2), (7, 1, 1, 7), (8, 1, 8, 1), (8, 8, 1, 1)],
)
def test_a_batch_is_split_evenly(
    batch_size: int, accumulation: int, processes: int, parts: int
) -> None:
    train = TrainConfig(batch_size=batch_size, accumulation_steps=accumulation)
    assert micro_batch(Config(train=train), processes) == parts


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "near"),
    [(10, 1, 4, 8), (11, 1, 4, 12), (1, 2, 4, 8), (9, 4, 1, 8)],
)
def test_the_nearest_batch_is_told(
    batch_size: int, accumulation: int, processes: int, near: int
) -> None:
    train = TrainConfig(batch_size=batch_size, accumulation_steps=accumulation)
    with pytest.raises(ConfigError) as error:
        micro_batch(Config(train=train), processes)
    assert str(error.value) == (
        f"train.batch_size={batch_size} cannot be split evenly over {processes} processes × "
        f"{accumulation} accumulation steps; nearest is {near}"
    )


def test_pretraining_is_checked_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What any run is refused for, the architecture, the batch of this launch, and the path."""
    config = Config(data=DataConfig(path="photos"))
    check_pretraining(config)
    for wrong, message in (
        (replace(config, train=TrainConfig(epochs=0)), "train.epochs=0 must be above 0"),
        (replace(config, model=ModelConfig(name="none")), "model.name=none is unknown"),
        (replace(config, data=DataConfig()), "data.path is not set: the folder of your images"),
    ):
        with pytest.raises(ConfigError) as error:
            check_pretraining(wrong)
        assert str(error.value).startswith(message)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="over 3 processes × 1 accumulation steps"):
        check_pretraining(config)
