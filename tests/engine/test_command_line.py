"""The command line of a run: recipes, TOML files, flags, and one clear line for what is wrong."""

from dataclasses import asdict
from pathlib import Path

import pytest

from simmim.backbone.build import spec_from_dict, spec_to_dict
from simmim.command_line import find_recipe, load, load_finetuning, recipe_names
from simmim.config.finetune import FinetuneConfig
from simmim.config.sections import Config
from simmim.config.spec import resolve_spec
from simmim.config.values import config_class, from_dict, leaf_types
from simmim.downstream.finetune import classifier_spec
from simmim.errors import ConfigError
from simmim.method.simmim import SimMIMConfig
from simmim.training.schedule import resolve_schedule


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


@pytest.mark.parametrize("recipe", recipe_names(finetuning=True))
def test_every_finetuning_recipe_loads(recipe: str) -> None:
    config = load_finetuning([recipe, "--data.path=photos", "--pretrained=runs/mine"])
    assert config.output == f"runs/{recipe}"
    assert from_dict(asdict(config), FinetuneConfig) == config
    if config.model.name:
        spec = classifier_spec(config, None)
        assert not spec.problems()


@pytest.mark.parametrize("recipe", recipe_names(finetuning=False))
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
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str) -> None:
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
    for key in leaf_types(config_class(SimMIMConfig)):
        assert f"--{key}" in text
    assert "in pixels" in text
