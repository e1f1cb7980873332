"""The checks that a configuration's values fit together."""

import math
import os
from collections.abc import Sequence

from simmim.config.sections import Config, RunConfig
from simmim.config.spec import resolve_spec
from simmim.config.values import leaves
from simmim.environment import Launch
from simmim.errors import ConfigError
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE, KNOWN_BACKENDS


def check_pretraining(config: Config) -> None:
    """Raise ConfigError for what no method of pre-training can run, before any data is read."""
    data = config.data
    check_training(config)
    check_ranges(
        [
            ("data.flip", data.flip, 0, 1),
            ("data.dali_memory_mib", data.dali_memory_mib, 1, math.inf),
            ("validate.every_epochs", config.validate.every_epochs, 1e-9, math.inf),
            ("validate.batch_size", config.validate.batch_size, 0, math.inf),
            ("validate.pictures", config.validate.pictures, 0, 64),
        ]
    )
    if any(side < 1 for side in config.image_size):
        raise ConfigError(f"data.image_size={data.image_size} must be positive")
    check_crop("data", data.crop_scale, data.crop_ratio)
    resolve_spec(config)
    micro_batch(config, Launch.of_environment().size)
    if not data.path:
        raise ConfigError("data.path is not set: the folder of your images, --data.path=DIR")


def check_training(config: RunConfig) -> None:
    """Raise ConfigError for what no training run can do, whatever it trains."""
    data, train, schedule = config.data, config.train, config.schedule
    for key, value in leaves(config).items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            raise ConfigError(f"{key}={value} must be finite")
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and forced not in KNOWN_BACKENDS:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={forced} is unknown; known are {', '.join(KNOWN_BACKENDS)}"
        )
    check_ranges(
        [
            ("data.channels", data.channels, 1, math.inf),
            ("optim.eps", config.optim.eps, 1e-30, math.inf),
            ("optim.momentum", config.optim.momentum, 0, 0.9999999),
            ("optim.betas", min(config.optim.betas), 0, 0.9999999),
            ("optim.betas", max(config.optim.betas), 0, 0.9999999),
            ("schedule.warmup_lr", schedule.warmup_lr, 0, math.inf),
            ("schedule.min_lr", schedule.min_lr, 0, math.inf),
            ("schedule.gamma", schedule.gamma, 0, 1),
            ("schedule.step_epochs", schedule.step_epochs, 1e-9, math.inf),
            ("data.workers", data.workers, -1, 1024),
            ("data.prefetch", data.prefetch, 1, math.inf),
            ("data.timeout_s", data.timeout_s, 0.1, math.inf),
            ("data.max_pixels", data.max_pixels, 1, math.inf),
            ("train.steps", train.steps, 0, math.inf),
            ("train.batch_size", train.batch_size, 1, math.inf),
            ("train.accumulation_steps", train.accumulation_steps, 1, math.inf),
            ("train.clip_norm", train.clip_norm, 0, math.inf),
            ("train.max_bad_steps", train.max_bad_steps, 1, math.inf),
            ("model.drop_path", config.model.drop_path, 0, 0.999),
            ("optim.lr_batch", config.optim.lr_batch, 0, math.inf),
            ("optim.weight_decay", config.optim.weight_decay, 0, math.inf),
            ("schedule.warmup_epochs", schedule.warmup_epochs, 0, math.inf),
            ("schedule.warmup_steps", schedule.warmup_steps, 0, math.inf),
            ("checkpoint.every_steps", config.checkpoint.every_steps, 0, math.inf),
            ("checkpoint.keep_last", config.checkpoint.keep_last, 1, math.inf),
            ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 0, math.inf),
            ("log.every_steps", config.log.every_steps, 1, math.inf),
            ("log.picture_every_steps", config.log.picture_every_steps, -1, math.inf),
            ("log.pictures", config.log.pictures, 1, 64),
        ]
    )
    if train.steps == 0 and train.epochs <= 0:
        raise ConfigError(f"train.epochs={train.epochs} must be above 0")
    if config.optim.lr <= 0:
        raise ConfigError(f"optim.lr={config.optim.lr} must be above 0")
    if data.value_range is not None and not data.value_range[0] < data.value_range[1]:
        raise ConfigError(f"data.value_range={list(data.value_range)} must rise")
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != data.channels:
            raise ConfigError(f"data.{key} has {len(values)} values for {data.channels} channels")
    if data.std is not None and min(data.std) <= 0:
        raise ConfigError(f"data.std={data.std} must be above 0")
    if config.model.norm_target and (
        config.model.norm_target < 3 or config.model.norm_target % 2 == 0
    ):
        raise ConfigError(
            f"model.norm_target={config.model.norm_target} must be odd and at least 3, or 0"
        )
    if (
        schedule.name == "multistep"
        and not schedule.warmup_steps
        and min(schedule.milestones, default=0) < schedule.warmup_epochs
    ):
        raise ConfigError(
            f"schedule.milestones={schedule.milestones} begin before the warm-up ends "
            f"(schedule.warmup_epochs={schedule.warmup_epochs:g})"
        )


def check_ranges(ranges: Sequence[tuple[str, float, float, float]]) -> None:
    """Raise ConfigError for the first (key, value, low, high) whose value is out of its range."""
    for key, value, low, high in ranges:
        if not low <= value <= high:
            bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key}={value} must be {bound}")


def check_crop(section: str, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raise ConfigError unless `scale` and `ratio` are ranges that crops can be drawn from."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(f"{section}.crop_scale={list(scale)} must rise within 0 … 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ConfigError(f"{section}.crop_ratio={list(ratio)} must rise and be above 0")


def check_mask(config: Config) -> None:
    """Raise ConfigError unless the images can be masked in whole mask units."""
    spec, unit = resolve_spec(config), config.mask.unit
    check_ranges([("mask.unit", unit, 1, math.inf)])
    check_mask_ratio(config)
    divides = all(side % unit == 0 for side in config.image_size)
    if divides and unit % spec.patch_size == 0:
        return
    common = math.gcd(*config.image_size)
    fitting = [u for u in range(spec.patch_size, common + 1, spec.patch_size) if common % u == 0]
    near = min(fitting, key=lambda u: (abs(u - unit), u))
    size = "×".join(str(side) for side in config.image_size)
    what = (
        f"is no multiple of the patch size {spec.patch_size} px"
        if divides
        else f"does not divide images of {size} px"
    )
    raise ConfigError(f"mask.unit={unit} px {what}; nearest that fits is {near}")


def check_mask_ratio(config: Config) -> None:
    """Raise ConfigError unless the ratio is a share."""
    if not 0 < config.mask.ratio <= 1:
        raise ConfigError(f"mask.ratio={config.mask.ratio} must be above 0 and at most 1")


def micro_batch(config: RunConfig, world_size: int) -> int:
    """Images per device and backward pass.

    Raises:
        ConfigError: the batch cannot be split evenly.
    """
    parts = world_size * config.train.accumulation_steps
    size, rest = divmod(config.train.batch_size, parts)
    if rest or size < 1:
        near = max(1, round(config.train.batch_size / parts)) * parts
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be split evenly over {world_size} "
            f"processes × {config.train.accumulation_steps} accumulation steps; nearest is {near}"
        )
    return size
