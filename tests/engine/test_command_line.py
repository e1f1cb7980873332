"""The command line of a run: recipes, TOML files, flags, and one clear line for what is wrong."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from simmim import command_line as module
from simmim.backbone.build import spec_from_dict, spec_to_dict
from simmim.command_line import (
    find_recipe,
    load,
    load_finetuning,
    read_toml,
    recipe_folders,
    recipe_names,
)
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


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the shipped recipes, and a working folder beside it."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("own", "other", "finetune_own"):
        (folder / f"{name}.toml").write_text("[train]\nsteps = 3\n")
    (folder / "notes.txt").write_text("")
    monkeypatch.setattr(module, "recipe_folders", lambda: [folder])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_where_a_recipe_is_found(recipes: Path) -> None:
    own = recipes / "own.toml"
    # a file here comes first, then a name, then what the source tree calls a recipe
    assert find_recipe("own") == own
    assert find_recipe("configs/own.toml") == own
    with pytest.raises(ConfigError, match="no such config file"):
        find_recipe("own.toml")  # the folder it would be in is here
    Path("own").write_text("[train]\nsteps = 4\n")
    assert find_recipe("own") == Path("own")
    Path("mine.toml").write_text("")
    assert find_recipe("mine.toml") == Path("mine.toml")
    Path("configs").mkdir()
    for wrong in ("configs/own.toml", "nowhere.toml", "a/b"):
        with pytest.raises(ConfigError, match=rf"^{wrong}: no such config file$"):
            find_recipe(wrong)
    with pytest.raises(ConfigError) as error:
        find_recipe("oter")
    assert str(error.value) == "oter: no such config file or recipe; did you mean other?"
    assert recipe_names(finetuning=False) == ["other", "own"]
    assert recipe_names(finetuning=True) == ["finetune_own"]


def test_recipes_are_shipped_in_the_package_or_lie_in_the_source_tree() -> None:
    engine = Path(module.__file__).resolve().parent
    assert recipe_folders() == [
        folder for folder in (engine / "configs", engine.parents[1] / "configs") if folder.is_dir()
    ]
    assert recipe_folders()


def test_what_is_missing_is_told_with_the_recipes_there_are(recipes: Path) -> None:
    for arguments in ([], ["--train.steps=3"]):
        with pytest.raises(ConfigError) as error:
            load(arguments)
        assert str(error.value) == "CONFIG is missing: a TOML file, or a recipe (other, own)"
        with pytest.raises(ConfigError) as error:
            load_finetuning(arguments)
        assert str(error.value) == "CONFIG is missing: a TOML file, or a recipe (finetune_own)"


def test_a_recipe_of_the_other_command_is_refused(recipes: Path) -> None:
    with pytest.raises(ConfigError, match=r"^finetune_own is a recipe of `simmim finetune`$"):
        load(["finetune_own"])
    with pytest.raises(ConfigError, match=r"^own is a recipe of `simmim pretrain`$"):
        load_finetuning(["own"])
    # only shipped ones are told by their names
    Path("finetune_mine.toml").write_text("[train]\nsteps = 3\n")
    assert load(["finetune_mine.toml", "--data.path=x"]).train.steps == 3
    Path("mine.toml").write_text("")
    assert load_finetuning(["mine.toml", "--data.path=x", "--pretrained=y"]).pretrained == "y"


def test_flags_come_after_the_file_and_the_last_one_counts(recipes: Path) -> None:
    assert load(["own", "--data.path=x"]).train.steps == 3
    config = load(["own", "--data.path=x", "--train.steps=4", "--train.steps", "5"])
    assert config.train.steps == 5
    assert config.output == "runs/own"
    Path("mine.toml").write_text('output = "there"\n')
    assert load(["mine.toml", "--data.path=x"]).output == "there"
    assert load(["mine.toml", "--data.path=x", "--output="]).output == "runs/mine"


def test_the_method_decides_which_keys_there_are(recipes: Path) -> None:
    (recipes / "own.toml").write_text('[method]\nname = "tokens"\n[model]\nname = "vit_tiny"\n')
    config = load(["own", "--data.path=x", "--method.head=mlp"])
    assert (config.method.name, config.method.head) == ("tokens", "mlp")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"unknown flag --method\.head"):
        load(["own", "--data.path=x", "--method.name=simmim", "--method.head=mlp"])
    (recipes / "own.toml").write_text("[method]\nname = 3\n")
    with pytest.raises(ConfigError, match=r"^method\.name: expected str, got"):
        load(["own", "--data.path=x"])
    with pytest.raises(ConfigError, match=r"^method\.name=none is unknown"):
        load(["other", "--data.path=x", "--method.name=none"])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b'a = "\xff"')
    for wrong in (path, tmp_path):
        with pytest.raises(ConfigError, match=f"^{wrong}: "):
            read_toml(wrong)
    path.write_text("[model]\nnorm_target = 3\n[data]\nholdout = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key data\.holdout"):
        read_toml(path)
    assert read_toml(path, FinetuneConfig)["data"] == {"holdout": 3}  # a moved key is known too


def test_words_that_are_no_flags_are_one_line(recipes: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(["own", "--data.path=x", "other"])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^unknown flag --data\.pth; did you mean data\.path\?$"):
        load(["own", "--data.pth", "x"])
    with pytest.raises(ConfigError, match=r"^unknown flag --data\.pa; did you mean data\.path\?$"):
        load(["own", "--data.pa=x"])  # no abbreviations


@pytest.mark.parametrize(
    ("loading", "words"),
    [
        (load, ["Pre-train an encoder", "usage: simmim pretrain CONFIG", "--mask.ratio"]),
        (load_finetuning, ["Fine-tune a classifier", "usage: simmim finetune CONFIG", "--augment"]),
    ],
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_each_command(
    loading: Any, words: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        loading(["smoke", flag])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in words)


def test_notes_are_told_by_the_first_process(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["own", "--data.path=x", "--model.norm_target=3", "--optim.momentum=0.5"]
    assert load(flags).method.norm_target == 3  # type: ignore[attr-defined]
    moved = "simmim: model.norm_target is method.norm_target now, and was taken as that"
    idle = "simmim: optim.momentum=0.5 has no effect with optim.name=adamw"
    assert capsys.readouterr().err.splitlines() == [moved, idle]
    monkeypatch.setenv("RANK", "1")
    load(flags)
    assert capsys.readouterr().err == ""


def test_what_cannot_run_is_refused(recipes: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path is not set: the folder of your images"):
        load(["own"])
    with pytest.raises(ConfigError, match=r"^data\.path is not set: your labelled images"):
        load_finetuning(["finetune_own", "--pretrained=mine"])
    with pytest.raises(ConfigError, match=r"^mask\.unit=7 px does not divide"):
        load(["own", "--data.path=x", "--mask.unit=7"])


def test_a_call_leaves_nothing_to_the_next(recipes: Path) -> None:
    first = load(["own", "--data.path=x"])
    load(
        ["own", "--data.path=y", "--train.steps=9", "--model.drop_path=0.5", "--data.mean=[1,1,1]"]
    )
    assert load(["own", "--data.path=x"]) == first
    with pytest.raises(ConfigError):
        load(["own", "--data.path=x", "--train.steps=many"])
    assert load(["own", "--data.path=x"]) == first
