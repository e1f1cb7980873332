"""The keys of fine-tuning: defaults as published, and one line for what cannot run."""

from dataclasses import replace
from typing import Any

import pytest

from config_keys import keys_of
from simmim.command_line import load_finetuning
from simmim.config.finetune import (
    AugmentConfig,
    EncoderConfig,
    FinetuneConfig,
    FinetuneTrainConfig,
    LabelledConfig,
    check_finetuning,
)
from simmim.config.sections import Config
from simmim.config.values import leaves
from simmim.errors import ConfigError
from simmim.training.schedule import resolve_schedule

# As published for the fine-tuning of Swin-B (microsoft/SimMIM, configs/swin_base__100ep/).
OWN_KEYS: dict[str, tuple[Any, str]] = {
    "model.name": ("", ""),
    "model.drop_path": (0.1, "[0, 0.999]"),
    "data.image_size": (None, "[1, inf]"),
    "data.val_path": ("", ""),
    "data.holdout": (0, "[0, inf]"),
    "data.labels": ("", ""),
    "data.val_labels": ("", ""),
    "data.classes": ("", ""),
    "data.first_number": (None, ""),
    "data.fraction": (1.0, "(0, 1]"),
    "train.ema_decay": (0.0, "[0, 0.9999999]"),
    "optim.lr": (0.00125, "(0, inf]"),
    "optim.decay_position_tables": (False, ""),
    "optim.layer_decay": (0.9, "[1e-06, 1]"),
    "schedule.warmup_epochs": (20, "[0, inf]"),
    "schedule.warmup_lr": (2.5e-07, "[0, inf]"),
    "schedule.min_lr": (2.5e-07, "[0, inf]"),
    "pretrained": ("", ""),
    "augment.crop_scale": ((0.08, 1.0), "(0, 1] rising"),
    "augment.crop_ratio": ((0.75, 1.3333333333333333), "(0, inf] rising"),
    "augment.flip": (0.5, "[0, 1]"),
    "augment.auto_augment": ("rand-m9-mstd0.5-inc1", ""),
    "augment.color_jitter": (0.4, "[0, inf]"),
    "augment.erase": (0.25, "[0, 1]"),
    "augment.erase_mode": ("pixel", "pixel rand const"),
    "augment.erase_count": (1, "[1, inf]"),
    "augment.mixup": (0.8, "[0, inf]"),
    "augment.cutmix": (1.0, "[0, inf]"),
    "augment.mix_probability": (1.0, "[0, 1]"),
    "augment.mix_switch": (0.5, "[0, 1]"),
    "augment.smoothing": (0.1, "[0, 0.999]"),
    "augment.margin": (None, ""),
    "evaluate.every_epochs": (1.0, "[1e-09, inf]"),
    "evaluate.batch_size": (0, "[0, inf]"),
}

NOT_THERE = [
    "data.crop_scale",
    "data.crop_ratio",
    "data.flip",
    "data.backend",
    "data.dali_memory_mib",
    "method.name",
    "mask.unit",
    "mask.ratio",
    "validate.path",
    "validate.every_epochs",
    "validate.batch_size",
    "validate.pictures",
]


def test_what_fine_tuning_sets_otherwise_than_pretraining() -> None:
    keys, others = keys_of(FinetuneConfig), keys_of(Config)
    assert {key: v for key, v in keys.items() if others.get(key) != v} == OWN_KEYS
    assert [key for key in others if key not in keys] == NOT_THERE


def config(**sections: Any) -> FinetuneConfig:
    return FinetuneConfig(
        **{"pretrained": "mine", "data": LabelledConfig(path="photos")} | sections
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"augment": AugmentConfig(margin=0.99)},
            "augment.margin=0.99 must be at least 1, or 0 to squeeze",
        ),
        ({"pretrained": ""}, "pretrained is not set: the encoder to start from"),
        (
            {"data": LabelledConfig(path="photos", val_path="more", holdout=3)},
            "data.holdout and data.val_path are both set: leave one out",
        ),
        (
            {"train": FinetuneTrainConfig(batch_size=3)},
            "3 images per device and backward pass cannot be mixed in pairs: choose an even number "
            "by --train.batch_size, or --augment.mixup=0 --augment.cutmix=0",
        ),
        ({"data": LabelledConfig()}, "data.path is not set: your labelled images, --data.path=DIR"),
        (
            {"train": FinetuneTrainConfig(batch_size=6, accumulation_steps=4)},
            "train.batch_size=6 cannot be split evenly over 1 processes × 4 accumulation steps; "
            "nearest is 8",
        ),
        # what no run can do
        (
            {"data": LabelledConfig(path="photos", mean=[0.5])},
            "data.mean has 1 values for 3 channels",
        ),
    ],
)
def test_one_line_for_what_cannot_run(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_finetuning(config(**sections))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"augment": AugmentConfig(margin=0)},
        {"augment": AugmentConfig(margin=1)},
        {"pretrained": "", "model": EncoderConfig(name="vit_base")},
        {"data": LabelledConfig(path="photos", val_path="more")},
        {"data": LabelledConfig(path="photos", holdout=3)},
        {"train": FinetuneTrainConfig(batch_size=3), "augment": AugmentConfig(mixup=0, cutmix=0)},
    ],
)
def test_what_can_run(sections: dict[str, Any]) -> None:
    check_finetuning(config(**sections))


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=0), AugmentConfig(cutmix=0)])
def test_either_way_of_mixing_takes_pairs(augment: AugmentConfig) -> None:
    odd = config(train=FinetuneTrainConfig(batch_size=3), augment=augment)
    with pytest.raises(ConfigError, match="cannot be mixed in pairs"):
        check_finetuning(odd)
    check_finetuning(replace(odd, train=FinetuneTrainConfig(batch_size=4)))


def test_pairs_are_those_of_one_process_and_one_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    accumulated = config(train=FinetuneTrainConfig(batch_size=12, accumulation_steps=2))
    with pytest.raises(ConfigError, match=r"^3 images per device and backward pass"):
        check_finetuning(accumulated)
    check_finetuning(replace(accumulated, train=FinetuneTrainConfig(batch_size=12)))


def test_the_published_recipe_is_the_defaults() -> None:
    """Swin-B at 192 px for 100 epochs of ImageNet, as published for a batch of 2048."""
    recipe = load_finetuning(
        ["finetune_swin_base_192_100ep", "--data.path=photos", "--pretrained=mine", "--output=here"]
    )
    own = {"model.name": "swin_base", "data.image_size": 192}
    own |= {"data.path": "photos", "pretrained": "mine", "output": "here"}
    assert leaves(recipe) == leaves(FinetuneConfig()) | own
    schedule = resolve_schedule(recipe, 1_281_167)
    assert (schedule.lr, schedule.warmup_lr) == pytest.approx((5e-3, 1e-6))
    assert schedule.min_lr == pytest.approx(1e-6)
    assert schedule.warmup_steps == 20 * 1_281_167 // 2048
