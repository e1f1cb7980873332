"""Configuration: one clear line for everything that cannot run, and every key reachable."""

from dataclasses import asdict
from pathlib import Path

import pytest

from simmim.backbone.build import spec_from_dict, spec_to_dict
from simmim.command_line import find_recipe, load, load_finetuning, recipe_folders
from simmim.config.check import micro_batch
from simmim.config.finetune import FinetuneConfig
from simmim.config.sections import Config
from simmim.config.spec import resolve_spec
from simmim.config.values import from_dict, leaf_types, leaves, to_toml
from simmim.downstream.finetune import classifier_spec
from simmim.errors import ConfigError
from simmim.training.schedule import resolve_schedule

RECIPES = sorted(p.stem for p in recipe_folders()[0].glob("*.toml"))


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("finetune_")])
def test_every_finetuning_recipe_loads(recipe: str) -> None:
    config = load_finetuning([recipe, "--data.path=photos", "--pretrained=runs/mine"])
    assert config.output == f"runs/{recipe}"
    assert from_dict(asdict(config), FinetuneConfig) == config
    if config.model.name:
        spec = classifier_spec(config, None)
        assert not spec.problems()


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.startswith("finetune_")])
def test_every_recipe_loads(recipe: str) -> None:
    config = parse(recipe=recipe)
    spec = resolve_spec(config)
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert config.output == f"runs/{recipe}"


def test_published_recipes() -> None:
    """Swin-B for 100 epochs of ImageNet: the numbers of the published configuration."""
    config = parse(recipe="swin_base_192_100ep")
    schedule = resolve_schedule(config, 1_281_167)
    assert schedule.lr == pytest.approx(8e-4)
    assert schedule.warmup_lr == pytest.approx(4e-6)
    assert schedule.min_lr == pytest.approx(4e-5)
    assert schedule.total_steps == 62556
    assert schedule.warmup_steps == 6255
    assert (config.train.clip_norm, config.optim.weight_decay) == (5.0, 0.05)
    long = resolve_schedule(parse(recipe="vit_base_224_800ep"), 1_281_167)
    assert long.lr == pytest.approx(4e-4)
    assert long.warmup_lr == pytest.approx(2e-6)
    drop = int(long.milestones[0]) + 2
    assert long.value_at(drop) == pytest.approx(4e-5)
    assert long.value_at(drop - 4) == pytest.approx(4e-4)


def test_contract_of_the_command_line(tmp_path: Path) -> None:
    config = load(
        [
            "configs/smoke.toml",
            "--data.path=DIR",
            f"--output={tmp_path}",
            "--train.steps=60",
            "--checkpoint.every_steps=7",
            "--seed=11",
        ]
    )
    assert (config.data.path, config.train.steps) == ("DIR", 60)
    assert (config.checkpoint.every_steps, config.seed) == (7, 11)
    assert config.output == str(tmp_path)


def test_values_of_every_kind() -> None:
    config = parse(
        "--data.image_size=[64,128]",
        "--data.crop_scale=[0.5,0.9]",
        "--train.compile=true",
        "--train.precision=fp16",
        "--train.clip_norm=3",
        "--model.depths=[1,1]",
        "--data.mean=[0.1,0.2,0.3]",
        "--kernels.backend=reference",
        "--output=elsewhere",
    )
    assert config.image_size == (64, 128)
    assert config.data.crop_scale == (0.5, 0.9)
    assert config.train.compile is True
    assert config.train.precision == "fp16"
    assert config.train.clip_norm == 3
    assert config.model.depths == [1, 1]
    assert config.data.mean == [0.1, 0.2, 0.3]
    assert config.kernels.backend == "reference"
    assert config.output == "elsewhere"


def test_round_trip_through_toml(tmp_path: Path) -> None:
    config = parse("--data.image_size=[64,128]", "--output=run", "--kernels.backend=native")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load([str(tmp_path / "config.toml")]) == config
    assert from_dict(asdict(config), Config) == config
    assert leaves(config).keys() == leaf_types().keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.stps=3"], "unknown flag --train.stps; did you mean train.steps?"),
        (["--steps=3"], "unknown flag --steps; did you mean train.steps?"),
        (["--lr=3"], "unknown flag --lr; did you mean optim.lr?"),
        (["--train.steps=many"], "train.steps: expected int, got 'many'"),
        (["--train.steps=1.5"], "train.steps: expected int, got '1.5'"),
        (["--train.compile=perhaps"], "train.compile: expected bool, got 'perhaps'"),
        (["--train.precision=fp8"], "train.precision: expected Literal['float32', 'bf16', 'fp16']"),
        (["--data.crop_scale=[0.9,0.5]"], "data.crop_scale=[0.9, 0.5] must rise"),
        (["--model.name=swin_bse"], "model.name=swin_bse is unknown; did you mean swin_base?"),
        (["--data.image_size=192", "--mask.unit=40"], "nearest that fits is 32"),
        (
            ["--mask.unit=6"],
            "mask.unit=6 px does not divide images of 64×64 px; nearest that fits is 4",
        ),
        (["--mask.unit=2"], "no multiple of the patch size 4 px; nearest that fits is 4"),
        (["--model.window_size=5"], "model.window_size: a window of 5 tokens does not fit"),
        (
            ["--data.image_size=65"],
            "data.image_size: 65×65 px is no multiple of the encoder stride 8",
        ),
        (["--model.num_heads=[3,4]"], "model.num_heads: 3 does not divide the width 16"),
        (["--model.layer_scale=0.1"], "model.layer_scale has no meaning for swin_tiny"),
        (["--mask.ratio=0"], "mask.ratio=0.0 must be above 0"),
        (["--mask.ratio=1.5"], "mask.ratio=1.5 must be above 0"),
        (["--data.channels=0"], "data.channels=0 must be at least 1"),
        (["--data.value_range=[9,9]"], "data.value_range=[9.0, 9.0] must rise"),
        (["--data.timeout_s=0"], "data.timeout_s=0.0 must be at least 0.1"),
        (["--data.std=[1,1]"], "data.std has 2 values for 3 channels"),
        (["--train.batch_size=10", "--train.accumulation_steps=4"], "nearest is 8"),
        (["--train.batch_size=0"], "train.batch_size=0 must be at least 1"),
        (["--model.norm_target=8"], "model.norm_target=8 must be odd"),
        (
            ["--schedule.name=multistep", "--schedule.milestones=[3]", "--schedule.warmup_steps=0"],
            "begin before the warm-up ends",
        ),
        (["--data.path="], "data.path is not set"),
        (["--log.pictures=0"], "log.pictures=0 must be between 1 and 64"),
    ],
)
def test_one_line_for_what_cannot_run(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[train]\nstps = 3\n")
    with pytest.raises(
        ConfigError, match=r"bad\.toml: unknown key train\.stps; did you mean train\.steps"
    ):
        load([str(bad)])
    bad.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: .*line 1"):
        load([str(bad)])
    bad.write_text('[train]\nsteps = "ten"\n')
    with pytest.raises(ConfigError, match=r"train\.steps: expected int, got 'ten'"):
        load([str(bad)])
    with pytest.raises(ConfigError, match="no such config file or recipe; did you mean smoke"):
        load(["smok"])
    with pytest.raises(ConfigError, match="no such config file"):
        load(["nowhere/smok.toml"])
    with pytest.raises(ConfigError, match="CONFIG is missing"):
        load([])
    assert find_recipe("configs/smoke.toml").samefile(find_recipe("smoke"))


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in leaf_types():
        assert f"--{key}" in text
    assert "in pixels" in text


def test_batch_is_split_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("--train.batch_size=24", "--train.accumulation_steps=3")
    assert micro_batch(config, 4) == 2
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match="5 processes × 3 accumulation steps; nearest is 30"):
        parse("--train.batch_size=24", "--train.accumulation_steps=3")
