"""The configuration of a fine-tuning run; its defaults are the published recipe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from simmim import command_line
from simmim.config.check import check_crop, check_ranges, check_training, micro_batch
from simmim.config.sections import (
    ImagesConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from simmim.environment import Launch
from simmim.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Encoder. Unset fields come from the checkpoint, or from the preset where it is named."""

    name: str = ""
    """Preset, as in pre-training; unset takes the checkpoint's architecture."""
    drop_path: float = 0.1
    """Stochastic-depth rate of the last block, 0 to 1; grows linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(ImagesConfig):
    """Labelled images. Classes are the folders', the shards', or those of a label file."""

    image_size: int | tuple[int, int] | None = None
    """Side, or [height, width], of the views, in pixels; unset is the checkpoint's."""
    val_path: str = ""
    """Validation images; unset takes PATH/val beside PATH/train, else holds images of data.path out."""
    holdout: int = 0
    """Images of data.path to hold out, evenly over the classes, where there are no validation images; 0 is a tenth, 50000 at most."""
    labels: str = ""
    """Label file of data.path (CSV, TSV, JSON, JSONL, lists); unset takes the source's own labels, else class folders."""
    val_labels: str = ""
    """Label file of data.val_path."""
    classes: str = ""
    """File with the names of a label file's classes."""
    first_number: int | None = None
    """What a label file of numbers calls the first class: 0 or 1."""
    fraction: float = 1.0
    """Share of the training images of every class that is used, drawn by the seed: 0.01 or 0.1 as in semi-supervised runs."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is drawn for training views and batches (extra `finetune` for all but crop and flip)."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop covers; views of up to 32 pixels are shifted instead."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment, AutoAugment or AugMix policy; empty for none."""
    color_jitter: float = 0.4
    """Strength of colour jitter; without effect beside auto_augment."""
    erase: float = 0.25
    """Probability of random erasing."""
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    """Erase with noise, one random colour, or the mean."""
    erase_count: int = 1
    """Rectangles erased at most."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 for none."""
    mix_probability: float = 1.0
    """Probability that a batch is mixed."""
    mix_switch: float = 0.5
    """Probability of CutMix where both are on."""
    smoothing: float = 0.1
    """Label smoothing."""
    margin: float | None = None
    """Evaluation views: the image covers margin times the view before the central crop; unset is 256/224, and 1 up to 32 pixels."""


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig(TrainConfig):
    """Length and arithmetic of the run."""

    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated and exported; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """Optimiser and parameter groups."""

    lr: float = 1.25e-3
    """Peak learning rate of the head for a batch of lr_batch images; scaled by batch_size / lr_batch."""
    decay_position_tables: bool = False
    """Decay Swin's relative position tables; the published fine-tuning does not. A ViT's are always decayed."""
    layer_decay: float = 0.9
    """Factor of the learning rate from each layer to the one before it; 1 for none."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When and how the validation images are classified."""

    every_epochs: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    batch_size: int = 0
    """Images per device; 0 takes that of training."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning run."""

    pretrained: str = ""
    """Weights to start from: a run folder, checkpoint or weights file in any layout that `simmim convert` reads; unset trains from scratch."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    data: LabelledConfig = field(default_factory=LabelledConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(warmup_epochs=20, warmup_lr=2.5e-7, min_lr=2.5e-7)
    )
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def load_finetuning(arguments: Sequence[str], program: str = "simmim finetune") -> FinetuneConfig:
    """The configuration that a command line asks for, checked; see `command_line.load_as`."""
    return command_line.load_as(
        FinetuneConfig, check_finetuning, arguments, program, "Fine-tune a classifier"
    )


def check_finetuning(config: FinetuneConfig) -> None:
    """Raise ConfigError for anything that cannot run, before any data is read."""
    data, augment = config.data, config.augment
    check_training(config)
    check_ranges(
        [
            ("data.holdout", data.holdout, 0, math.inf),
            ("augment.flip", augment.flip, 0, 1),
            ("augment.color_jitter", augment.color_jitter, 0, math.inf),
            ("augment.erase", augment.erase, 0, 1),
            ("augment.erase_count", augment.erase_count, 1, math.inf),
            ("augment.mixup", augment.mixup, 0, math.inf),
            ("augment.cutmix", augment.cutmix, 0, math.inf),
            ("augment.mix_probability", augment.mix_probability, 0, 1),
            ("augment.mix_switch", augment.mix_switch, 0, 1),
            ("augment.smoothing", augment.smoothing, 0, 0.999),
            ("train.ema_decay", config.train.ema_decay, 0, 0.9999999),
            ("optim.layer_decay", config.optim.layer_decay, 1e-6, 1),
            ("evaluate.every_epochs", config.evaluate.every_epochs, 1e-9, math.inf),
            ("evaluate.batch_size", config.evaluate.batch_size, 0, math.inf),
        ]
    )
    check_crop("augment", augment.crop_scale, augment.crop_ratio)
    if not 0 < data.fraction <= 1:
        raise ConfigError(f"data.fraction={data.fraction} must be above 0 and at most 1")
    if augment.margin is not None and augment.margin != 0 and augment.margin < 1:
        raise ConfigError(f"augment.margin={augment.margin} must be at least 1, or 0 to squeeze")
    if not config.pretrained and not config.model.name:
        raise ConfigError(
            "pretrained is not set: the encoder to start from, --pretrained=runs/NAME; or name an "
            "architecture with --model.name to train from scratch"
        )
    if config.data.val_path and config.data.holdout:
        raise ConfigError("data.holdout and data.val_path are both set: leave one out")
    size = micro_batch(config, Launch.of_environment().size)
    if size % 2 and (augment.mixup or augment.cutmix):
        raise ConfigError(
            f"{size} images per device and backward pass cannot be mixed in pairs: choose an even "
            "number by --train.batch_size, or --augment.mixup=0 --augment.cutmix=0"
        )
    if not data.path:
        raise ConfigError("data.path is not set: your labelled images, --data.path=DIR")
