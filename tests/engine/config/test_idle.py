"""Settings that cannot act: refused or told, each in one line; no shipped recipe has one."""

import pytest

from simmim.command_line import load, load_finetuning, recipe_names
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
