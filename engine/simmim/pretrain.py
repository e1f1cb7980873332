"""One pre-training run, from a configuration to weights; readable top to bottom."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from simmim import distributed, precision
from simmim.backbone.build import build_encoder
from simmim.config import Config, KernelsConfig, resolve_spec
from simmim.data.build import make_loader
from simmim.data.loader import Loader
from simmim.data.source import open_source
from simmim.distributed import World
from simmim.errors import RunError
from simmim.interrupts import Interrupts
from simmim.log import RunLog
from simmim.loop import Loop, train
from simmim.method.simmim import SimMIM
from simmim.optim import build_optimizer
from simmim.reconstruct import FixedSamples, save_picture
from simmim.run_folder import run_folder
from simmim.schedule import resolve_schedule
from simmim.step import TrainState
from simmim_kernels.splitmix import fold, signed
from simmim_kernels.window_attention import BACKENDS as ATTENTION_BACKENDS


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
    schedule = resolve_schedule(config, len(source.names))
    model = build_model(config, world.device)
    optimizer = build_optimizer(model, config.optim)
    wrapped: nn.Module = distributed.wrap(model, world)
    if config.train.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    state = TrainState(model, wrapped, optimizer, config, schedule, world)
    log = RunLog(
        folder,
        schedule.total_steps,
        is_main=world.is_main,
        tensorboard=config.log.tensorboard,
    )
    with closing(log):
        return train(
            state,
            source,
            lambda: make_loader(config, source, world),
            lambda loader: Pictures(loader, config, world),
            folder,
            log,
            interrupts,
        )


class Pictures:
    """Draws reconstructions of the same images as the run goes on; see `simmim.loop.Observer`."""

    busy = False

    def __init__(self, loader: Loader, config: Config, world: World) -> None:
        self.config, self.world = config, world
        drawn = world.is_main and config.log.picture_every_steps >= 0
        self.samples = FixedSamples(loader.source, config) if drawn else None

    def begin(self, loop: Loop) -> None:
        """Nothing is drawn before the first step."""

    def observe(self, loop: Loop, *, last: bool, stopping: bool) -> None:
        """Draw where a picture is due."""
        if self.samples is None or not self._is_due(loop, last):
            return
        assert isinstance(loop.state.model, SimMIM)
        with precision.autocast(self.world.device, self.config.train.precision):
            picture = self.samples.draw(loop.state.model)
        if picture is not None:
            path = loop.folder / "pictures" / f"step_{loop.state.step:08d}.png"
            try:
                save_picture(picture, path)
            except OSError as error:
                loop.log.warn(f"{path}: could not be written: {error.strerror}")
            loop.log.picture(np.asarray(picture), loop.state.step)
        loop.restart_clock()

    def _is_due(self, loop: Loop, last: bool) -> bool:
        every = self.config.log.picture_every_steps
        if every == 0:
            return loop.state.step == loop.saved_step
        return last or loop.state.step % every == 0

    def finish(self, loop: Loop) -> None:
        """Say where the pictures are."""
        pictures = loop.folder / "pictures"
        if self.world.is_main and pictures.is_dir():
            loop.log.info(f"pictures in {pictures}")


def build_model(config: Config, device: torch.device) -> SimMIM:
    """The configured model, initialised from the run's seed, on `device`.

    Raises:
        RunError: `kernels` names a backend that cannot run here.
    """
    check_backends(config.kernels, device)
    chosen = config.kernels
    torch.manual_seed(signed(fold(config.seed)))
    model = SimMIM(
        build_encoder(resolve_spec(config)),
        norm_target=config.model.norm_target or None,
        mean=config.data.mean,
        std=config.data.std,
    )
    model.encoder.activation_checkpointing = config.train.activation_checkpointing
    model.use_backend(chosen.backend, chosen.attention)
    if config.channels_last_on(device.type):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def check_backends(chosen: KernelsConfig, device: torch.device) -> None:
    """Raise RunError where `kernels` names a backend that cannot run on `device`."""
    x = torch.empty(0, device=device)
    against = {b.name: b.reasons_against(x) for b in ATTENTION_BACKENDS}
    for key, name in (("backend", chosen.backend), ("attention", chosen.attention)):
        if name is not None and against[name]:
            raise RunError(f"kernels.{key}={name} cannot run: {'; '.join(against[name])}")
