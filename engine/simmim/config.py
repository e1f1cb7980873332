"""The configuration of a run: frozen dataclasses, and the check that they fit together."""

import difflib
import json
import math
import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from typing import Any, Literal, TypeVar

from simmim.backbone.build import Spec, find_preset
from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.vit import ViTSpec
from simmim.validation_config import ValidateConfig
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE, KNOWN_BACKENDS

ConfigT = TypeVar("ConfigT")

# Fields of ModelConfig that are not the architecture's, and those where one stage has a number.
_NOT_OF_SPEC = ("name", "drop_path", "norm_target")
_OF_ONE_STAGE = {"depths": "depth", "num_heads": "num_heads"}


class ConfigError(ValueError):
    """A configuration that cannot run; one line that names the key and what would work."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder. Unset fields come from the preset."""

    name: str = "swin_base"
    """Preset, such as swin_base, swinv2_base, vit_base, resnet50 (`simmim models` lists them), or timm:NAME."""
    patch_size: int | None = None
    """Side of a patch, in pixels."""
    embed_dim: int | None = None
    """Width of the (first stage's) tokens."""
    depths: list[int] | None = None
    """Blocks per stage; one number for a ViT."""
    num_heads: list[int] | None = None
    """Heads per stage; one number for a ViT."""
    window_size: int | None = None
    """Swin: side of an attention window, in tokens."""
    mlp_ratio: float | None = None
    """Hidden width of the MLP over its width."""
    qk_scale: float | None = None
    """Factor of q·k; unset is 1/sqrt(head width)."""
    absolute_position: bool | None = None
    """Add a learned absolute position to the tokens."""
    shared_relative_position: bool | None = None
    """ViT: one relative position table shared by all blocks, as published."""
    layer_scale: float | None = None
    """ViT: initial LayerScale gain; 0 has no LayerScale."""
    class_token: bool | None = None
    """ViT: a class token before the patch tokens."""
    frozen_position: bool | None = None
    """ViT: the absolute position is a table of sines and cosines that does not train."""
    final_norm: bool | None = None
    """ViT: a norm after the last block."""
    qkv_bias: bool | None = None
    """Biases of q, k and v (a ViT's k has none)."""
    drop_path: float = 0.0
    """Stochastic-depth rate of the last block, 0 to 1; grows linearly from 0."""
    norm_target: int = 0
    """Window (odd, pixels) over which the target is normalised; 0 regresses the pixels; 47 as published for SwinV2."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Images, whatever is done with them."""

    path: str = ""
    """Folder of images (any layout), folder of .tar shards, or one .tar file."""
    channels: int = 3
    """1 reads images as grey, 3 as RGB, 4 as RGBA; another number must be that of the files (.npy, multi-band TIFF)."""
    value_range: tuple[float, float] | None = None
    """The two values that become 0 and 255 where files hold other than 8 bits; unset takes the upper 8 of 16 bits."""
    mean: list[float] | None = None
    """Mean per channel on the 0-1 scale; unset is ImageNet's for 3 channels, else 0.5."""
    std: list[float] | None = None
    """Standard deviation per channel on the 0-1 scale; unset is ImageNet's for 3 channels, else 0.25."""
    workers: int = -1
    """Decoding processes per device; 0 decodes in the training process; -1 chooses from the CPU count."""
    prefetch: int = 4
    """Batches held ready per device."""
    timeout_s: float = 120
    """Seconds after which a process that is still at one image is replaced; an image that does it twice is left out."""
    max_pixels: int = 2**27
    """Images of more pixels are left out before they are decoded."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Images and their augmentation."""

    image_size: int | tuple[int, int] = 192
    """Side, or [height, width], of the training crops, in pixels."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    backend: Literal["auto", "cpu", "dali"] = "auto"
    """What decodes: processes on the CPU, or NVIDIA DALI (extra `dali`), on the GPU where there is one; auto takes DALI on CUDA if it is installed."""
    dali_memory_mib: int = 2048
    """Memory that DALI may take per device, on the GPU and page-locked together, in MiB."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is hidden."""

    unit: int = 32
    """Side of a mask unit, in pixels; a multiple of the patch size that divides the image."""
    ratio: float = 0.6
    """Share of the units that is hidden; rounded up to whole units."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How the encoder is pre-trained; each method has keys of its own."""

    name: str = "simmim"
    """Method: simmim, or another that `simmim models` lists."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and arithmetic of the run."""

    epochs: float = 100
    """Passes over the data."""
    steps: int = 0
    """Optimiser steps; 0 takes them from epochs."""
    batch_size: int = 2048
    """Images per optimiser step, over all devices and accumulation steps."""
    accumulation_steps: int = 1
    """Backward passes per optimiser step; the update is that of the whole batch."""
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    """Compute type of autocast; weights and optimiser state stay float32; fp16 scales the loss."""
    clip_norm: float = 5.0
    """Largest global gradient norm; 0 does not clip."""
    channels_last: bool | None = None
    """Keep images and convolutions in channels-last memory format; unset does so on CUDA, and for a ConvNet that model.name names everywhere."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, much less memory."""
    sync_batch_norm: bool = True
    """Batch norms take their statistics from the whole batch over all processes, not each from its own images."""
    compile: bool = False
    """Run the model through torch.compile."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient (each is skipped)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and parameter groups."""

    name: Literal["adamw", "sgd", "lamb"] = "adamw"
    """AdamW, SGD with momentum, or LAMB."""
    lr: float = 2e-4
    """Peak learning rate for a batch of lr_batch images; scaled by batch_size / lr_batch."""
    lr_batch: int = 512
    """Batch size that lr, warmup_lr and min_lr are meant for, in images; 0 does not scale them."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the decayed parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments of AdamW and LAMB."""
    eps: float = 1e-8
    """Epsilon of AdamW and LAMB."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """SGD: Nesterov's momentum instead of the plain one."""
    decay_position_tables: bool = True
    """Decay relative position tables: the published pre-training does (a keyword rule there never matches); false exempts them."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate per step: linear warm-up, then the named schedule."""

    name: Literal["cosine", "multistep", "linear", "step", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: float = 10
    """Length of the warm-up, in epochs."""
    warmup_steps: int = 0
    """Length of the warm-up, in steps; 0 takes it from warmup_epochs."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step, before batch scaling."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine, before batch scaling."""
    milestones: list[float] = field(default_factory=lambda: [700.0])
    """multistep: epochs at which the rate drops."""
    step_epochs: float = 30
    """step: epochs between drops."""
    gamma: float = 0.1
    """multistep and step: factor of each drop."""
    warmup_prefix: bool = False
    """Start the cosine at its peak after the warm-up (microsoft/Swin-Transformer) instead of where it would stand by then (microsoft/SimMIM)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when."""

    every_steps: int = 0
    """Steps between checkpoints; 0 saves once an epoch, or every 100 steps where epochs are shorter."""
    keep_last: int = 3
    """How many of the newest checkpoints stay."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this many steps stay for good; 0 keeps none so."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown, and when."""

    every_steps: int = 10
    """Steps between progress lines; metrics.jsonl has a row for every step all the same."""
    picture_every_steps: int = 0
    """Steps between reconstruction pictures; 0 draws one with every checkpoint; -1 none."""
    pictures: int = 6
    """Images in a reconstruction picture."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Backends of the fused ops."""

    backend: Literal["triton", "native", "reference"] | None = None
    """Backend that every op must use; unset takes the first that can run."""
    attention: Literal["triton", "native", "xformers", "reference"] | None = None
    """Backend of attention and its projections, where it is to be another; reference is PyTorch's scaled_dot_product_attention."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

    seed: int = 0
    """Seed of initialisation, sample order, augmentation, masks and stochastic depth."""
    output: str = ""
    """Run folder; a run that is there is resumed. Unset is runs/NAME-OF-THE-CONFIG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when a device is there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def channels_last_on(self, device_type: str) -> bool:
        """Whether images and convolutions are channels-last on a type of device."""
        if self.train.channels_last is not None:
            return self.train.channels_last
        return device_type == "cuda" or self._is_convnet()

    def _is_convnet(self) -> bool:
        try:
            return isinstance(find_preset(self.model.name), ConvNetSpec)
        except ValueError:  # a fine-tuning run whose weights tell the architecture
            return False


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the training crops, in pixels."""
        size = self.data.image_size
        return (size, size) if isinstance(size, int) else size


def config_class(settings: type[MethodConfig]) -> type[Config]:
    """The class of the pre-training runs of a method, whose [method] table `settings` describes."""
    if settings not in _CONFIG_CLASSES:
        _CONFIG_CLASSES[settings] = make_dataclass(
            "Config",
            [("method", settings, field(default_factory=settings))],
            bases=(Config,),
            namespace={"__doc__": Config.__doc__, "__module__": Config.__module__},
            frozen=True,
            kw_only=True,
        )
    return _CONFIG_CLASSES[settings]


_CONFIG_CLASSES: dict[type[MethodConfig], type[Config]] = {MethodConfig: Config}


def leaf_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every key ("train.steps") and its type."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            found |= leaf_types(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = hints[f.name]
    return found


def leaves(config: RunConfig) -> dict[str, Any]:
    """Every key ("train.steps") and its value."""
    return dict(flatten(asdict(config)))


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or a list of what there is when nothing is near."""
    by_tail = {k.rsplit(".", 1)[-1]: k for k in known}
    if match := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean {match[0]}?"
    if match := difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_tail), n=1, cutoff=0.7):
        return f"did you mean {by_tail[match[0]]}?"
    return f"known are {', '.join(known)}"


def to_toml(config: RunConfig) -> str:
    """The resolved configuration, every key, as TOML; unset keys are left out."""
    top, sections = [], []
    for key, value in asdict(config).items():
        if isinstance(value, dict):
            lines = [
                f"{k} = {json.dumps(v, ensure_ascii=False)}"
                for k, v in value.items()
                if v is not None
            ]
            sections.append("\n".join([f"[{key}]", *lines]))
        elif value is not None:
            top.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n\n".join(["\n".join(top), *sections]) + "\n"


def from_dict(values: dict[str, Any], cls: type[ConfigT]) -> ConfigT:
    """A configuration from nested plain values (as `dataclasses.asdict` gives them)."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            arguments[name] = from_dict(value, typing.cast(type, hints[name]))
        elif isinstance(value, list) and "tuple" in str(hints[name]):
            arguments[name] = tuple(value)
        else:
            arguments[name] = value
    return cls(**arguments)


def resolve_spec(config: Config) -> Spec:
    """The encoder's architecture: the preset with the configured fields in place.

    Raises:
        ConfigError: unknown preset, a field of the other family, or parts that do not fit.
    """
    return make_spec(config.model, config.image_size, config.data.channels)


def make_spec(
    model: ModelConfig, image_size: tuple[int, int], channels: int, preset: Spec | None = None
) -> Spec:
    """An encoder's architecture: a preset with the configured fields in place.

    Args:
        model: the configured fields.
        image_size: (height, width) in pixels.
        channels: of the images.
        preset: instead of the one that `model.name` names.

    Raises:
        ConfigError: unknown preset, a field of the other family, or parts that do not fit.
    """
    if preset is None:
        try:
            preset = find_preset(model.name)
        except ValueError as error:
            raise ConfigError(f"model.name={error}") from None
    given: dict[str, Any] = {
        f.name: getattr(model, f.name) for f in fields(ModelConfig) if f.name not in _NOT_OF_SPEC
    }
    given = {name: _as_tuple(value) for name, value in given.items() if value is not None}
    known = {f.name for f in fields(preset)}
    if "depth" in known:  # one stage: a number where others have a list
        given = {_OF_ONE_STAGE.get(name, name): v for name, v in _single(given, model).items()}
    for name in given:
        if name not in known:
            family = model.name or f"a {preset.arch}"
            raise ConfigError(f"model.{name} has no meaning for {family}; leave it out")
    spec: Spec = replace(
        preset, image_size=image_size, channels=channels, drop_path=model.drop_path, **given
    )
    if isinstance(spec, ViTSpec) and spec.layer_scale == 0:
        spec = replace(spec, layer_scale=None)
    for name in ("patch_size", "embed_dim", "depths", "depth", "num_heads", "window_size"):
        value = getattr(spec, name, 1)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            key = "depths" if name == "depth" else name
            raise ConfigError(f"model.{key}={value} must be at least 1 everywhere")
    if (mlp_ratio := getattr(spec, "mlp_ratio", 1)) <= 0:
        raise ConfigError(f"model.mlp_ratio={mlp_ratio} must be above 0")
    for field_name, message in spec.problems():
        section = "data" if field_name == "image_size" else "model"
        raise ConfigError(f"{section}.{field_name}: {message}")
    return spec


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _single(given: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Lists of one number → the number."""
    for name in _OF_ONE_STAGE.keys() & given.keys():
        if len(given[name]) != 1:
            raise ConfigError(
                f"model.{name}={list(given[name])}: {model.name} takes one number, such as [12]"
            )
    return {name: v[0] if name in _OF_ONE_STAGE else v for name, v in given.items()}


def check(config: Config) -> None:
    """Raise ConfigError for what no method of pre-training can run, before any data is read."""
    data = config.data
    check_run(config)
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
    micro_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    if not data.path:
        raise ConfigError("data.path is not set: the folder of your images, --data.path=DIR")


def check_run(config: RunConfig) -> None:
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
