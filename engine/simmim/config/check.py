"""The checks that a configuration's values fit together."""

import math
import os

from simmim.config.bounds import check_bounds
from simmim.config.sections import Config, RunConfig
from simmim.config.spec import resolve_spec
from simmim.config.values import leaves
from simmim.environment import Launch
from simmim.errors import ConfigError
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE, KNOWN_BACKENDS


def check_pretraining(config: Config) -> None:
    """Raise ConfigError for what no method of pre-training can run, before any data is read."""
    check_training(config)
    resolve_spec(config)
    micro_batch(config, Launch.of_environment().size)
    if not config.data.path:
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
    check_bounds(config)
    if train.steps == 0 and train.epochs <= 0:
        raise ConfigError(f"train.epochs={train.epochs} must be above 0")
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != data.channels:
            raise ConfigError(f"data.{key} has {len(values)} values for {data.channels} channels")
    if (
        schedule.name == "multistep"
        and not schedule.warmup_steps
        and min(schedule.milestones, default=0) < schedule.warmup_epochs
    ):
        raise ConfigError(
            f"schedule.milestones={schedule.milestones} begin before the warm-up ends "
            f"(schedule.warmup_epochs={schedule.warmup_epochs:g})"
        )


def check_mask(config: Config) -> None:
    """Raise ConfigError unless the images can be masked in whole mask units."""
    spec, unit = resolve_spec(config), config.mask.unit
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
