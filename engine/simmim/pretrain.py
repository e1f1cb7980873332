"""One pre-training run, from a configuration to weights; readable top to bottom."""

from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from simmim import distributed
from simmim.backbone.build import build_encoder
from simmim.backbone.encoder import EncoderSpec
from simmim.config import Config, KernelsConfig, resolve_spec
from simmim.data.build import make_loader
from simmim.data.loader import Batch
from simmim.data.source import open_source
from simmim.distributed import World
from simmim.errors import RunError
from simmim.interrupts import Interrupts
from simmim.log import RunLog
from simmim.loop import Loop, train
from simmim.method.build import find_method
from simmim.method.images import ImageModel
from simmim.method.method import Method
from simmim.observer import Observer, Observers
from simmim.optim import build_optimizer
from simmim.run_folder import run_folder
from simmim.schedule import resolve_schedule
from simmim.step import TrainState
from simmim.validation import open_validation
from simmim_kernels.splitmix import fold, signed
from simmim_kernels.window_attention import BACKENDS as ATTENTION_BACKENDS
from simmim_kernels.window_attention import COSINE_BACKENDS

# Steps from a warning of the method to the next.
WARNING_INTERVAL = 1000


def pretrain(config: Config) -> int:
    """Pre-train as `config` says, resuming whatever its run folder holds.

    Returns:
        0 when the run is complete, 75 when a signal stopped it (run again to resume).

    Raises:
        ConfigError: the run folder cannot be used.
        simmim.data.source.DataError: no data.
        CheckpointError: a checkpoint could not be written or read.
        RunStopped: too many steps in a row had non-finite gradients.
    """
    world = distributed.init(config.device)
    with Interrupts() as interrupts, run_folder(config, world) as folder:
        code = _run(config, world, folder, interrupts)
    # not after an error: leaving the group waits for processes that may wait for this one
    distributed.finish(world)
    return code


def _run(config: Config, world: World, folder: Path, interrupts: Interrupts) -> int:
    source = open_source(config.data.path)
    if config.validate.path:
        open_validation(config)  # to say what is wrong with it now, not after hours
    method = find_method(config)
    state = build_state(config, len(source.names), world)
    log = RunLog(
        folder,
        state.schedule.total_steps,
        is_main=world.is_main,
        tensorboard=config.log.tensorboard,
    )
    with closing(log):
        return train(
            state,
            source,
            lambda: make_loader(config, source, world, method.view()),
            lambda loader: Observers([Watch(method), *method.observers(loader, world)]),
            folder,
            log,
            interrupts,
        )


def build_state(config: Config, num_images: int, world: World) -> TrainState:
    """The model, optimiser and schedule of a run, before its first step.

    Args:
        config: of the run.
        num_images: of the data, which tells how many steps an epoch has.
        world: this process.

    Raises:
        RunError: `kernels` names a backend that cannot run here.
    """
    method, model = find_method(config), build_model(config, world.device)
    optimizer = build_optimizer(model, config.optim, method.parameter_groups(model))
    wrapped = distributed.wrap(
        model,
        world,
        sync_batch_norm=config.train.sync_batch_norm,
        compile=config.train.compile,
    )
    schedule = resolve_schedule(config, num_images)

    def loss_of(state: TrainState, batch: Batch, number: int) -> Tensor:
        return method.loss(state.wrapped, batch)

    return TrainState(model, wrapped, optimizer, config, schedule, world, loss_of)


class Watch(Observer):
    """What the method measures: for metrics.jsonl, and its warning, at most once in a while."""

    def __init__(self, method: Method) -> None:
        self.method, self.next_warning = method, 0

    def measures(self, loop: Loop) -> dict[str, Tensor]:
        """See `Method.measures`."""
        return self.method.measures(loop.state.model)

    def measured(self, loop: Loop, values: dict[str, float]) -> None:
        """Say what the method warns of."""
        step = loop.state.step
        if step >= self.next_warning and (warning := self.method.warning(values)):
            self.next_warning = step + WARNING_INTERVAL
            if loop.world.is_main:
                loop.log.warn(f"step {step}: {warning}")


def build_model(config: Config, device: torch.device) -> ImageModel:
    """The configured model, initialised from the run's seed, on `device`.

    Raises:
        RunError: `kernels` names a backend that cannot run here.
    """
    chosen, spec = config.kernels, resolve_spec(config)
    check_backends(chosen, spec, device)
    torch.manual_seed(signed(fold(config.seed)))
    model = find_method(config).build(build_encoder(spec))
    model.encoder.activation_checkpointing = config.train.activation_checkpointing
    model.use_backend(chosen.backend, chosen.attention)
    if config.channels_last_on(device.type):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


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
