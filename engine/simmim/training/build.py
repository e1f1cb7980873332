"""Builds what a training run needs before its first step: the model as it runs, and its state."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from simmim.backbone.encoder import EncoderSpec
from simmim.config.sections import KernelsConfig, MaskConfig, RunConfig
from simmim.distributed import World
from simmim.errors import RunError
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
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


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
    """
    train = config.train
    wrapped = wrap(model, world, sync_batch_norm=train.sync_batch_norm, compile=train.compile)
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
