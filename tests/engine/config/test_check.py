"""Values that do not fit together: one clear line each."""

import pytest

from simmim.command_line import load
from simmim.config.check import micro_batch
from simmim.config.sections import Config
from simmim.errors import ConfigError


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
