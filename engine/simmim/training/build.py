"""Builds what a training run needs before its first step: the model as it runs, and its state."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from simmim.backbone.encoder import EncoderSpec
from simmim.config.sections import KernelsConfig, MaskConfig, RunConfig
from simmim.distributed import World
from simmim.errors import ConfigError, RunError
from simmim.model.image_model import ImageModel
from simmim.training.optim import build_optimizer
from simmim.training.parallel import wrap
from simmim.training.schedule import resolve_schedule
from simmim.training.step import LossOf, TrainState
from simmim_kernels.splitmix import fold, signed
from simmim_kernels.window_attention import BACKENDS as ATTENTION_BACKENDS
from simmim_kernels.window_attention import COSINE_BACKENDS

ModelT = TypeVar("ModelT", bound=ImageModel)


def seed_initialisation(config: RunConfig) -> None:
    """Seed torch's generators for the weights that a run draws."""
    torch.manual_seed(signed(fold(config.seed)))


def prepare_model(model: ModelT, config: RunConfig, device: torch.device) -> ModelT:
    """Move the model to `device`, and make it compute as the configuration says."""
    model.encoder.activation_checkpointing = config.train.activation_checkpointing
    model.use_backend(config.kernels.backend, config.kernels.attention)
    if config.channels_last_on(device.type):
        to_channels_last(model)
    return model.to(device)


def to_channels_last(model: torch.nn.Module) -> None:
    """Give the weights of convolutions the memory format of channels-last images, in place.

    Those of 1×1 convolutions stay as they are: in memory nothing would change, but their strides
    would no longer be those of the gradients of a fused head.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[2:].numel() > 1:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def build_state(
    model: ImageModel,
    config: RunConfig,
    num_images: int,
    world: World,
    *,
    parameter_groups: Callable[[Any], list[dict[str, Any]]],
    loss_of: LossOf,
    ema_decay: float = 0.0,
    mask: MaskConfig | None = None,
) -> TrainState:
    """Build a run's state: the model as it is called, its optimiser and its schedule.

    Args:
        model: the model that `prepare_model` returned.
        config: the run's configuration.
        num_images: number of images in the data, which gives the steps of an epoch.
        world: this process.
        parameter_groups: model → groups for the optimiser, see `simmim.training.optim`; it is
            called after the model is wrapped, because a wrapper may replace parameters.
        loss_of: see `TrainState`.
        ema_decay: see `TrainState`.
        mask: see `TrainState`.

    Raises:
        ConfigError: torch.compile was asked for where it makes steps slower.
    """
    train = config.train
    fused = model.encoder.fused_blocks and config.kernels.backend != "reference"
    if train.compile and fused and world.device.type == "cuda":
        raise ConfigError(
            f"train.compile=true: the blocks of {model.encoder.spec.arch} are fused kernels, which "
            "leave torch.compile nothing to fuse: a compiled step costs the host 1.7 times as much "
            "(bench/host_cost.py --compile), and no CUDA graph holds it. Leave it out, or set "
            "kernels.backend=reference"
        )
    wrapped = wrap(
        model,
        world,
        sync_batch_norm=train.sync_batch_norm,
        compile=train.compile,
        for_graph=train.cuda_graph != "off" and not train.compile,
    )
    optimizer = build_optimizer(model, config.optim, parameter_groups(model))
    schedule = resolve_schedule(config, num_images)
    return TrainState(model, wrapped, optimizer, config, schedule, world, loss_of, ema_decay, mask)


def check_backends(chosen: KernelsConfig, spec: EncoderSpec, device: torch.device) -> None:
    """Raise RunError where `kernels` names a backend that cannot run `spec` on `device`."""
    x = torch.empty(0, device=device)
    backends = COSINE_BACKENDS if spec.cosine_attention else ATTENTION_BACKENDS
    against = {b.name: b.reasons_against(x) for b in backends}
    for key, name in (("backend", chosen.backend), ("attention", chosen.attention)):
        if name is not None and name not in against:
            raise RunError(
                f"kernels.{key}={name} cannot run the cosine attention of {spec.arch}: it has "
                f"{', '.join(against)}"
            )
        if name is not None and against[name]:
            raise RunError(f"kernels.{key}={name} cannot run: {'; '.join(against[name])}")
