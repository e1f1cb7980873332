"""Settings that cannot act: refused or told, each in one line; no shipped recipe has one."""

from dataclasses import replace
from typing import Any

import pytest

from simmim.command_line import load, load_finetuning, recipe_names
from simmim.config.finetune import AugmentConfig, FinetuneConfig, LabelledConfig
from simmim.config.idle import IDLE, SET, Idle, idle_notes, refuse_idle
from simmim.config.sections import (
    Config,
    DataConfig,
    KernelsConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ValidateConfig,
)
from simmim.errors import ConfigError

SGD, FIXED = "--optim.name=sgd", "--schedule.name=constant"


@pytest.mark.parametrize("recipe", recipe_names(finetuning=False))
def test_no_recipe_of_pretraining_has_one(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    load([recipe, "--data.path=photos"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("recipe", recipe_names(finetuning=True))
def test_no_recipe_of_finetuning_has_one(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_finetuning([recipe, "--data.path=photos", "--pretrained=runs/mine"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("recipe", "flag", "message"),
    [
        ("simsiam_smoke", "--validate.path=photos", "validate.path=photos has no effect"),
        ("simsiam_smoke", "--validate.pictures=2", "validate.pictures=2 has no effect"),
        ("simsiam_smoke", "--method.norm_target=7", "unknown flag --method.norm_target"),
    ],
)
def test_what_a_user_must_not_overlook_is_refused(recipe: str, flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([recipe, "--data.path=photos", flag])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "flags", "key", "reason"),
    [
        (
            "smoke",
            [SGD, "--optim.betas=[0.8,0.9]"],
            "optim.betas=[0.8, 0.9]",
            "with optim.name=sgd",
        ),
        ("simsiam_smoke", ["--mask.unit=16"], "mask.unit=16", "with method.name=simsiam"),
        ("simsiam_smoke", ["--mask.ratio=0.5"], "mask.ratio=0.5", "with method.name=simsiam"),
        ("tokens_smoke", ["--mask.unit=16"], "mask.unit=16", "with method.name=tokens"),
        ("smoke", [SGD, "--optim.eps=1e-6"], "optim.eps=1e-06", "with optim.name=sgd"),
        ("smoke", ["--optim.momentum=0.5"], "optim.momentum=0.5", "with optim.name=adamw"),
        ("smoke", ["--optim.nesterov=false"], "optim.nesterov=False", "with optim.name=adamw"),
        ("smoke", ["--schedule.milestones=[9]"], "schedule.milestones=[9.0]", "name=cosine"),
        ("smoke", ["--schedule.step_epochs=9"], "schedule.step_epochs=9.0", "name=cosine"),
        ("smoke", ["--schedule.gamma=0.5"], "schedule.gamma=0.5", "name=cosine"),
        ("smoke", [FIXED], "schedule.min_lr=0.0001", "with schedule.name=constant"),
        (
            "smoke",
            [FIXED, "--schedule.warmup_prefix=true"],
            "schedule.warmup_prefix=True",
            "constant",
        ),
        (
            "smoke",
            ["--schedule.warmup_steps=0", "--schedule.warmup_epochs=0"],
            "schedule.warmup_lr=0.0001",
            "with schedule.warmup_epochs=0.0 and with schedule.warmup_steps=0",
        ),
        (
            "smoke",
            ["--data.backend=cpu", "--data.dali_memory_mib=99"],
            "data.dali_memory_mib=99",
            "with data.backend=cpu",
        ),
        (
            "smoke",
            ["--data.backend=cpu", "--data.workers=0", "--data.prefetch=9"],
            "data.prefetch=9",
            "with data.workers=0 and with data.backend=cpu",
        ),
        (
            "smoke",
            ["--validate.every_epochs=2"],
            "validate.every_epochs=2.0",
            "without validate.path",
        ),
        ("smoke", ["--validate.batch_size=2"], "validate.batch_size=2", "without validate.path"),
        ("smoke", ["--validate.pictures=2"], "validate.pictures=2", "without validate.path"),
        (
            "simmim_resnet50_300ep",
            ["--kernels.attention=reference"],
            "kernels.attention=reference",
            "in a ConvNet",
        ),
        ("tokens_smoke", ["--method.mlp_depth=2"], "method.mlp_depth=2", "with method.head=linear"),
        (
            "tokens_smoke",
            ["--method.mlp_hidden=2"],
            "method.mlp_hidden=2",
            "with method.head=linear",
        ),
        (
            "simsiam_smoke",
            ["--optim.decay_position_tables=false"],
            "optim.decay_position_tables=False",
            "with method.name=simsiam",
        ),
        ("finetune_smoke", ["--log.pictures=2"], "log.pictures=2", "in fine-tuning"),
        (
            "finetune_smoke",
            ["--log.picture_every_steps=2"],
            "log.picture_every_steps=2",
            "in fine-tuning",
        ),
        ("finetune_smoke", ["--model.final_norm=true"], "model.final_norm=True", "in fine-tuning"),
        (
            "finetune_smoke",
            ["--model.name=vit_tiny_plain", "--model.frozen_position=true"],
            "model.frozen_position=True",
            "in fine-tuning",
        ),
        (
            "finetune_smoke",
            ["--data.classes=names.txt"],
            "data.classes=names.txt",
            "without data.labels and without data.val_labels",
        ),
        (
            "finetune_smoke",
            ["--data.first_number=1"],
            "data.first_number=1",
            "without data.labels and without data.val_labels",
        ),
        (
            "finetune_smoke",
            ["--data.workers=0", "--data.timeout_s=9"],
            "data.timeout_s=9.0",
            "with data.workers=0",
        ),
        (
            "finetune_smoke",
            ["--augment.auto_augment=original"],
            "augment.color_jitter=0.0",
            "with augment.auto_augment=original",
        ),
        (
            "finetune_smoke",
            ["--augment.mixup=0.5", "--augment.mix_switch=0.3"],
            "mix_switch",
            "cutmix=0",
        ),
        (
            "finetune_smoke",
            ["--augment.cutmix=1", "--augment.mix_switch=0.3"],
            "mix_switch",
            "mixup=0",
        ),
    ],
)
def test_all_else_is_told(
    recipe: str, flags: list[str], key: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loading = load_finetuning if recipe.startswith("finetune_") else load
    pretrained = ["--pretrained=runs/mine"] if recipe.startswith("finetune_") else []
    loading([recipe, "--data.path=photos", *pretrained, *flags])  # type: ignore[operator]
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if f"{key}" in line]
    assert line.startswith("simmim: ")
    assert "has no effect" in line
    assert reason in line


def test_one_process_of_several_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    load(["smoke", "--data.path=photos", "--optim.momentum=0.5"])
    assert capsys.readouterr().err == ""


def told(config: RunConfig) -> set[str]:
    """The keys that have no effect in a run, as its notes say."""
    return {note.partition("=")[0] for note in idle_notes(config, IDLE)}


SCHEDULE = ScheduleConfig(
    milestones=[9.0], step_epochs=9, gamma=0.5, min_lr=0.5, warmup_prefix=True, warmup_lr=0.5
)


@pytest.mark.parametrize(
    ("name", "acting"),
    [
        ("cosine", {"min_lr", "warmup_prefix"}),
        ("multistep", {"milestones", "gamma"}),
        ("step", {"step_epochs", "gamma"}),
        ("linear", set()),
        ("constant", set()),
    ],
)
def test_what_acts_in_each_schedule(name: Any, acting: set[str]) -> None:
    shape = {"milestones", "step_epochs", "gamma", "min_lr", "warmup_prefix"}
    idle = {f"schedule.{key}" for key in shape - acting}
    assert told(Config(schedule=replace(SCHEDULE, name=name))) == idle


@pytest.mark.parametrize(
    ("epochs", "steps", "idle"),
    [(0, 0, {"schedule.warmup_lr"}), (1, 0, set()), (0, 1, set()), (1, 1, set())],
)
def test_a_warm_up_of_any_length_begins_at_its_rate(
    epochs: float, steps: int, idle: set[str]
) -> None:
    schedule = ScheduleConfig(warmup_epochs=epochs, warmup_steps=steps, warmup_lr=0.5)
    assert told(Config(schedule=schedule)) == idle


@pytest.mark.parametrize(
    ("name", "idle"), [("sgd", {"betas", "eps"}), ("adamw", {"momentum", "nesterov"})]
)
def test_what_acts_in_each_optimiser(name: Any, idle: set[str]) -> None:
    optim = OptimConfig(name=name, betas=(0.5, 0.5), eps=0.5, momentum=0.5, nesterov=False)
    assert told(Config(optim=optim)) == {f"optim.{key}" for key in idle}


@pytest.mark.parametrize(
    ("backend", "workers", "idle"),
    [
        ("cpu", 0, {"dali_memory_mib", "prefetch", "timeout_s"}),
        ("cpu", 1, {"dali_memory_mib"}),
        ("dali", 0, set()),
        ("auto", 0, set()),
    ],
)
def test_what_acts_in_each_way_of_decoding(backend: Any, workers: int, idle: set[str]) -> None:
    data = DataConfig(backend=backend, workers=workers, dali_memory_mib=9, prefetch=9, timeout_s=9)
    assert told(Config(data=data)) == {f"data.{key}" for key in idle}


def test_fine_tuning_decodes_in_its_own_processes() -> None:
    data = LabelledConfig(workers=0, prefetch=9, timeout_s=9)
    assert told(FinetuneConfig(data=data)) == {"data.prefetch", "data.timeout_s"}
    assert told(FinetuneConfig(data=replace(data, workers=1))) == set()


def test_settings_of_validation_act_with_images() -> None:
    validate = ValidateConfig(every_epochs=9, batch_size=9, pictures=9)
    keys = {"validate.every_epochs", "validate.batch_size", "validate.pictures"}
    assert told(Config(validate=validate)) == keys
    assert told(Config(validate=replace(validate, path="photos"))) == set()


def test_attention_and_pictures_are_not_everywhere() -> None:
    kernels, log = KernelsConfig(attention="reference"), LogConfig(pictures=9)
    log = replace(log, picture_every_steps=9)
    assert told(Config(kernels=kernels, log=log)) == set()
    convnet = ModelConfig(name="resnet50")
    assert told(Config(kernels=kernels, log=log, model=convnet)) == {"kernels.attention"}
    assert told(FinetuneConfig(kernels=kernels, log=log)) == {
        "log.pictures",
        "log.picture_every_steps",
    }


@pytest.mark.parametrize(
    ("files", "idle"),
    [
        ({}, {"data.classes", "data.first_number"}),
        ({"labels": "l"}, set()),
        ({"val_labels": "l"}, set()),
    ],
)
def test_a_label_file_is_explained_where_there_is_one(
    files: dict[str, str], idle: set[str]
) -> None:
    data = LabelledConfig(classes="c", first_number=0, **files)  # type: ignore[arg-type]
    assert told(FinetuneConfig(data=data)) == idle


@pytest.mark.parametrize(
    ("augment", "idle"),
    [
        ({"color_jitter": 0.5}, {"augment.color_jitter"}),
        ({"color_jitter": 0.5, "auto_augment": ""}, set()),
        ({"mix_switch": 0.25}, set()),
        ({"mix_switch": 0.25, "mixup": 0}, {"augment.mix_switch"}),
        ({"mix_switch": 0.25, "cutmix": 0}, {"augment.mix_switch"}),
    ],
)
def test_augmentations_that_replace_one_another(augment: dict[str, Any], idle: set[str]) -> None:
    assert told(FinetuneConfig(augment=AugmentConfig(**augment))) == idle


def test_a_default_needs_no_word() -> None:
    assert told(Config()) == set()
    assert told(FinetuneConfig()) == set()
    own_default = FinetuneConfig().schedule.warmup_lr
    schedule = ScheduleConfig(warmup_epochs=0, warmup_lr=own_default)
    assert told(FinetuneConfig(schedule=schedule)) == set()
    assert told(Config(schedule=schedule)) == {"schedule.warmup_lr"}


def test_a_section_is_all_of_its_keys_and_refused_where_it_must_not_be_overlooked() -> None:
    config = Config(validate=ValidateConfig(path="photos", pictures=2), log=LogConfig(pictures=3))
    note, refusal = (
        Idle(("validate",), {"method.name": SET}, refused=refused) for refused in (False, True)
    )
    lines = [
        "validate.path=photos has no effect with method.name=simmim",
        "validate.pictures=2 has no effect with method.name=simmim",
    ]
    assert idle_notes(config, [note]) == lines
    refuse_idle(config, [note])
    assert idle_notes(config, [refusal]) == []
    with pytest.raises(ConfigError) as error:
        refuse_idle(config, [note, refusal])
    assert str(error.value) == f"{lines[0]}: leave it out"
    elsewhere = Idle(("validate",), {"method.name": ("tokens",)}, refused=True)
    refuse_idle(config, [elsewhere])
