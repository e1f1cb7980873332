"""The configuration of a fine-tuning run; its defaults are the published recipe."""

from dataclasses import dataclass, field
from typing import Literal

from simmim.config.bounds import bounded
from simmim.config.check import check_training, micro_batch
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
    """Preset, as in pre-training. The default is the checkpoint's architecture."""
    drop_path: float = bounded(0.1, low=0, high=0.999)
    """Stochastic-depth rate of the last block. The rate grows linearly from 0 at the first block."""


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(ImagesConfig):
    """Labelled images. Their classes come from folders, shards or a label file."""

    image_size: int | tuple[int, int] | None = bounded(None, low=1)
    """Side, or [height, width], of the views, in pixels. The default is the checkpoint's."""
    val_path: str = ""
    """Validation images. By default, PATH/val is taken if it is beside PATH/train; otherwise images of data.path are held out."""
    holdout: int = bounded(0, low=0)
    """Images of data.path to hold out, evenly over the classes, where there are no validation images; 0 is a tenth, 50000 at most."""
    labels: str = ""
    """Label file of data.path (CSV, TSV, JSON, JSONL, lists); unset takes the source's own labels, else class folders."""
    val_labels: str = ""
    """Label file of data.val_path."""
    classes: str = ""
    """File with the names of a label file's classes."""
    first_number: int | None = None
    """What a label file of numbers calls the first class: 0 or 1."""
    fraction: float = bounded(1.0, above=0, high=1)
    """Share of the training images of every class that is used, drawn by the seed: 0.01 or 0.1 as in semi-supervised runs."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is drawn for training views and batches (extra `finetune` for all but crop and flip)."""

    crop_scale: tuple[float, float] = bounded((0.08, 1.0), above=0, high=1, order="rising")
    """Smallest and largest share of the image's area that a random crop covers. Views of up to 32 pixels are shifted instead of cropped."""
    crop_ratio: tuple[float, float] = bounded((3 / 4, 4 / 3), above=0, order="rising")
    """Smallest and largest width/height of a random crop."""
    flip: float = bounded(0.5, low=0, high=1)
    """Probability of a horizontal flip."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """Name that timm gives a RandAugment, AutoAugment or AugMix policy. An empty name is no policy."""
    color_jitter: float = bounded(0.4, low=0)
    """Strength of colour jitter. It has no effect together with auto_augment."""
    erase: float = bounded(0.25, low=0, high=1)
    """Probability of random erasing."""
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What is drawn into an erased rectangle: noise (pixel), one random colour (rand) or the mean (const)."""
    erase_count: int = bounded(1, low=1)
    """Largest number of rectangles that are erased."""
    mixup: float = bounded(0.8, low=0)
    """Alpha of mixup. 0 does not mix so."""
    cutmix: float = bounded(1.0, low=0)
    """Alpha of CutMix. 0 does not mix so."""
    mix_probability: float = bounded(1.0, low=0, high=1)
    """Probability that a batch is mixed."""
    mix_switch: float = bounded(0.5, low=0, high=1)
    """Probability of CutMix, rather than mixup, where both are on."""
    smoothing: float = bounded(0.1, low=0, high=0.999)
    """Label smoothing."""
    margin: float | None = None
    """Evaluation views: before the central crop, the image is scaled to cover the view times this factor. The default is 256/224, or 1 for views of up to 32 pixels; 0 squeezes the whole image into the view."""


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig(TrainConfig):
    """Length and arithmetic of the run."""

    ema_decay: float = bounded(0.0, low=0, high=0.9999999)
    """Decay per step of an exponential moving average of the weights. The average is then evaluated and exported. 0 keeps no average."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """Optimiser and parameter groups."""

    lr: float = bounded(1.25e-3, above=0)
    """Peak learning rate of the head for a batch of lr_batch images. It is scaled by batch_size / lr_batch."""
    decay_position_tables: bool = False
    """Decay the relative position tables of a Swin, which the published fine-tuning does not. Those of a ViT are always decayed."""
    layer_decay: float = bounded(0.9, low=1e-6, high=1)
    """Factor of the learning rate from each layer to the layer before it. With 1, all layers learn at the same rate."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When and how the validation images are classified."""

    every_epochs: float = bounded(1.0, low=1e-9)
    """Epochs between evaluations. The last step is always evaluated."""
    batch_size: int = bounded(0, low=0)
    """Images per device. 0 takes as many as in training."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning run."""

    pretrained: str = ""
    """Weights to start from: a run folder, checkpoint or weights file in any layout that `simmim convert` reads. Without any, the run trains from scratch."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    data: LabelledConfig = field(default_factory=LabelledConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(warmup_epochs=20, warmup_lr=2.5e-7, min_lr=2.5e-7)
    )
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def check_finetuning(config: FinetuneConfig) -> None:
    """Raise ConfigError for anything that cannot run, before any data is read."""
    data, augment = config.data, config.augment
    check_training(config)
    if augment.margin is not None and augment.margin != 0 and augment.margin < 1:
        raise ConfigError(f"augment.margin={augment.margin} must be at least 1, or 0 to squeeze")
    if not config.pretrained and not config.model.name:
        raise ConfigError(
            "pretrained is not set: the encoder to start from, --pretrained=runs/NAME; or name an "
            "architecture with --model.name to train from scratch"
        )
    if data.val_path and data.holdout:
        raise ConfigError("data.holdout and data.val_path are both set: leave one out")
    size = micro_batch(config, Launch.of_environment().size)
    if size % 2 and (augment.mixup or augment.cutmix):
        raise ConfigError(
            f"{size} images per device and backward pass cannot be mixed in pairs: choose an even "
            "number by --train.batch_size, or --augment.mixup=0 --augment.cutmix=0"
        )
    if not data.path:
        raise ConfigError("data.path is not set: your labelled images, --data.path=DIR")
