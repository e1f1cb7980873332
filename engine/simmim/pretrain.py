"""One pre-training run, from a configuration to weights; readable top to bottom."""

from contextlib import closing

import torch
from torch import Tensor

from simmim.backbone.build import build_encoder
from simmim.config.sections import Config
from simmim.data.batch import Batch
from simmim.data.build import make_loader
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.distributed import World
from simmim.errors import from_setting
from simmim.method.build import find_method
from simmim.method.method import MaskingMethod, Method
from simmim.model.image_model import ImageModel
from simmim.observers import MethodMeasures, Pictures
from simmim.run_folder import RunFolder
from simmim.training import build
from simmim.training.claim import claimed_run
from simmim.training.interrupts import Interrupts
from simmim.training.log import RunLog
from simmim.training.loop import train
from simmim.training.observer import Observer, Observers
from simmim.training.step import TrainState
from simmim.validation import Validation, open_validation


def pretrain(config: Config) -> int:
    """Pre-train as `config` says, resuming whatever its run folder holds.

    Returns:
        0 when the run is complete, 75 when a signal stopped it (run again to resume).

    Raises:
        ConfigError: the run folder cannot be used.
        DataError: there are no images.
        CheckpointError: a checkpoint could not be written or read.
        RunStopped: data fails under way, or too many steps in a row had non-finite gradients.
    """
    with claimed_run(config) as (world, folder, interrupts):
        return _run(config, world, folder, interrupts)


def _run(config: Config, world: World, folder: RunFolder, interrupts: Interrupts) -> int:
    with from_setting("data.path"):
        source = open_source(config.data.path)
    if config.validate.path:
        open_validation(config)  # to say what is wrong with it now, not after hours
    method = find_method(config)
    state = build_state(config, len(source.names), world, method)
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
            lambda loader: _observers(method, loader, world),
            folder,
            log,
            interrupts,
        )


def _observers(method: Method, loader: Loader, world: World) -> Observers:
    """What the run does between its steps, as [log] and [validate] say.

    Raises:
        ConfigError: see `Validation`.
        DataError: there are no images to validate on.
    """
    config, observers = method.config, list[Observer]([MethodMeasures(method)])
    if world.is_main and config.log.picture_every_steps >= 0:
        draw = method.picture(loader.source)
        observers += [] if draw is None else [Pictures(draw)]
    if config.validate.path:
        assert isinstance(method, MaskingMethod)  # others refuse the setting
        observers.append(Validation(method, world))
    return Observers(observers)


def build_state(
    config: Config, num_images: int, world: World, method: Method | None = None
) -> TrainState:
    """Build the model, optimiser and schedule of a run, before its first step.

    Args:
        config: the run's configuration.
        num_images: number of images in the data, which gives the steps of an epoch.
        world: this process.
        method: the run's method; None builds it.

    Raises:
        RunError: `kernels` names a backend that cannot run here.
    """
    method = method or find_method(config)

    def loss_of(state: TrainState, batch: Batch, number: int) -> Tensor:
        return method.loss(state.wrapped, batch)

    return build.build_state(
        build_model(config, world.device, method),
        config,
        num_images,
        world,
        parameter_groups=method.parameter_groups,
        loss_of=loss_of,
        mask=config.mask,
    )


def build_model(config: Config, device: torch.device, method: Method | None = None) -> ImageModel:
    """Build the configured model on `device`, initialised from the run's seed.

    Args:
        config: the run's configuration.
        device: where the model runs.
        method: the run's method; None builds it.

    Raises:
        RunError: `kernels` names a backend that cannot run here.
    """
    method = method or find_method(config)
    build.check_backends(config.kernels, method.spec, device)
    build.seed_initialisation(config)
    return build.prepare_model(method.build(build_encoder(method.spec)), config, device)
