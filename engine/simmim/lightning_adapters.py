"""Runs any method of the engine under Lightning's Trainer: its module, its data, its rates.

The Trainer replaces the engine's loop: its own arguments decide devices, precision, accumulation,
checkpoints and logs, and not the configuration's [train], [checkpoint] and [log]. Batches, masks,
rates, clipping and therefore losses are those of `simmim pretrain`. Everything else that the
engine does (skipping steps with non-finite gradients, pictures, validation) is left to callbacks.
"""

import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from simmim import files
from simmim.config.sections import Config
from simmim.data.batch import Batch
from simmim.data.build import make_loader
from simmim.data.open import open_source
from simmim.distributed import World
from simmim.errors import ConfigError, from_setting
from simmim.method.build import find_method
from simmim.model.weights_file import save_weights
from simmim.pretrain import build_model
from simmim.training.build import check_backends, to_channels_last
from simmim.training.optim import build_optimizer
from simmim.training.schedule import Schedule, resolve_schedule
from simmim.training.step import seed_step
from simmim.training.sync_batch_norm import convert

try:
    from lightning import LightningDataModule, LightningModule
except ImportError as error:
    raise ImportError(
        f"simmim.lightning_adapters needs Lightning ({error}): pip install 'simmim[lightning]'"
    ) from None

log = logging.getLogger("simmim")


class MethodDataModule(LightningDataModule):
    """The micro-batches of a run, from the present step of the Trainer on.

    Every process takes its own part of the run's order, which is the same for any number of
    processes; Lightning must add no sampler (`use_distributed_sampler=False`). An epoch of
    Lightning has as many whole steps as the images fill, and the next one continues where it ended,
    so no image is left out. The position is a function of `trainer.global_step` alone, so a resumed
    run continues at the exact sample.

    Args:
        config: the run's configuration; `train.batch_size` is that of a step over all processes,
            and `train.accumulation_steps` must be the Trainer's `accumulate_grad_batches`.

    Attributes:
        schedule: the run's rates and number of steps, for `MethodModule` and `max_steps`.

    Raises:
        simmim.errors.DataError: there are no images.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        with from_setting("data.path"):
            self.source = open_source(config.data.path)
        self.schedule = resolve_schedule(config, len(self.source.names))
        self.steps_per_epoch = max(1, len(self.source.names) // config.train.batch_size)
        self._steps: Generator[list[Batch], None, None] | None = None
        self._next_step = -1
        self._unreadable: set[int] = set()

    def train_dataloader(self) -> "MicroBatchStream":
        """The run's micro-batches, already on the device."""
        return MicroBatchStream(self)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Return the batch, which is already on the device."""
        return batch

    def micro_batches_of(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; consecutive steps need no new start."""
        if self._steps is None or step != self._next_step:
            self.close()
            world, view = world_of(self.trainer), find_method(self.config).view()
            self.loader = make_loader(self.config, self.source, world, view)
            self.loader.report = log.warning
            end = max(self.schedule.total_steps, step + self.steps_per_epoch)
            self._steps = self.loader.steps(step, end)
        batches = next(self._steps)
        self._next_step = step + 1
        for sample, reason in self.loader.problems:
            if sample not in self._unreadable:
                log.warning("unreadable: %s: %s", self.source.names[sample], reason)
            self._unreadable.add(sample)
        self.loader.problems = []
        return batches

    def close(self) -> None:
        """End the data workers."""
        if self._steps is not None:
            self._steps.close()
        self._steps = None

    def teardown(self, stage: str) -> None:
        """See `close`."""
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        """See `close`."""
        self.close()


class MicroBatchStream:
    """What a Trainer iterates over: it never ends, and `len` is the micro-batches of an epoch."""

    def __init__(self, data: MethodDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch * self.data.config.train.accumulation_steps

    def __iter__(self) -> Iterator[Batch]:
        # this runs when the first batch is asked for: by then a resumed Trainer knows its step
        trainer = self.data.trainer
        assert trainer is not None
        while True:
            yield from self.data.micro_batches_of(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the fingerprint of the images, which a resumed run checks."""
        names = self.data.source.names
        return {"images": len(names), "digest": names.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn if the images are not those of the checkpoint; the position needs no state."""
        if state != self.state_dict():
            log.warning(
                "data.path: %s images, the checkpoint was of %s, or other names; the order of the "
                "samples is another one from here on",
                len(self.data.source.names),
                state.get("images"),
            )


class MethodModule(LightningModule):
    """The module, loss and optimiser of the method that a configuration names.

    It logs "loss", the mean of a step over its micro-batches and all processes, and what the method
    measures.

    Args:
        config: the run's configuration.
        schedule: the schedule of `MethodDataModule`.

    Attributes:
        model: the engine's module, which every function of the engine takes.
    """

    def __init__(self, config: Config, schedule: Schedule) -> None:
        super().__init__()
        self.config, self.schedule = config, schedule
        self.method = find_method(config)
        self.model = build_model(config, torch.device("cpu"))
        # in the present step: Σ loss·share, and each micro-batch's share of slots with an image
        self._loss, self._shares = torch.zeros(()), list[float]()

    def setup(self, stage: str) -> None:
        """Check what depends on the Trainer, and take the memory format of its device."""
        trainer, wanted = self.trainer, self.config.train.accumulation_steps
        if trainer.accumulate_grad_batches != wanted:
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and "
                f"train.accumulation_steps={wanted} differ; give the Trainer {wanted}"
            )
        device = trainer.strategy.root_device
        check_backends(self.config.kernels, self.model.encoder.spec, device)
        if trainer.world_size > 1 and self.config.train.sync_batch_norm:
            convert(self.model)  # in place: the optimiser's parameters stay the same
        if self.config.channels_last_on(device.type):
            to_channels_last(self.model)

    def on_fit_start(self) -> None:
        """Refuse Lightning's own batch norms: they would replace ours, and have no CPU kernels."""
        if any(type(module) is torch.nn.SyncBatchNorm for module in self.modules()):
            raise ConfigError(
                "Trainer(sync_batchnorm=True) replaces our batch norms; leave it out, and set "
                "train.sync_batch_norm=true"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        """The run's optimiser and the rate of every step."""
        groups = self.method.parameter_groups(self.model)
        optimizer: Any = build_optimizer(self.model, self.config.optim, groups)
        # a fused optimiser unscales by itself, but Lightning clips only what Lightning unscaled
        optimizer._step_supports_amp_scaling = False
        scheduler = StepRates(optimizer, self.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The method's loss of a micro-batch; empty slots carry no weight."""
        if not self._shares:
            seed_step(self.config.seed, self.global_step, world_of(self.trainer))
        share = batch.num_valid / len(batch.ids)
        loss: Tensor = self.method.loss(self.model, batch) * share
        self._loss = loss.detach() + (self._loss if self._shares else 0.0)
        self._shares.append(share)
        if len(self._shares) == self.config.train.accumulation_steps:
            mean = self._loss / max(sum(self._shares), 1e-9)
            measures = self.method.measures(self.model)
            self.log_dict({"loss": mean, **measures}, batch_size=len(batch.ids), sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide gradients, which count empty slots as images, by the share that held one."""
        share = torch.tensor(sum(self._shares) / len(self._shares), device=self.device)
        self._shares = []
        if self.trainer.world_size > 1:
            share = self.trainer.strategy.reduce(share, reduce_op="mean")
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # a step without any image has zeros, which stay zeros
        torch._foreach_div_(gradients, share.clamp(min=1e-9))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, or else to `train.clip_norm`."""
        if gradient_clip_val is None:
            gradient_clip_val = self.config.train.clip_norm
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")

    def save_weights(self, path: str | Path) -> None:
        """Write the weights as the engine does, for `load_model` and every other command."""
        files.write_atomic(
            Path(path), lambda temporary: save_weights(self.model, temporary, self.config.mask)
        )


class StepRates(LRScheduler):
    """The engine's rate of every step, as a PyTorch scheduler that is stepped once per step."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self.schedule = schedule
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of every group at step `last_epoch`, as PyTorch calls the number of steps."""
        return [
            self.schedule.rate_of(group, self.last_epoch) for group in self.optimizer.param_groups
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; the configuration gives the schedule."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a step; the rates follow the present schedule."""
        self.last_epoch = int(state_dict["last_epoch"])
        for group, lr in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = lr


def world_of(trainer: Any) -> World:
    """This process as the engine knows it."""
    return World(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
