"""One optimisation step: accumulate, backward, clip once, check, update. Nothing is read back.

The optimiser is fused and takes two tensors, as in the protocol of torch.amp.GradScaler: it divides
gradients by `grad_scale`, and it leaves weights and state unchanged if `found_inf` is not 0.
Unscaling, clipping and skipping therefore need no extra pass and no synchronisation.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simmim.config.sections import MaskConfig, RunConfig
from simmim.data.batch import Batch
from simmim.distributed import World, all_reduce_sum
from simmim.model.image_model import ImageModel
from simmim.training import precision, running_statistics
from simmim.training.precision import LossScale
from simmim.training.schedule import Schedule
from simmim_kernels.gradient_norm import gradient_norm
from simmim_kernels.splitmix import fold, signed

LossOf = Callable[["TrainState", Batch, int], Tensor]

# Separates the step's draws (stochastic depth) from other uses of the same seed.
STREAM = 0x73746570  # "step"


class TrainState:
    """What a step changes: weights, optimiser, loss scale and the count of bad steps.

    Args:
        model: the module whose parameters train.
        wrapped: the same module as it is called (DistributedDataParallel, torch.compile).
        optimizer: its groups may carry "lr_scale" or "fixed_lr"; see `Schedule.rate_of`.
        config: the run's configuration.
        schedule: learning rates.
        world: this process.
        loss_of: (state, micro-batch, its number within the step) → the mean loss of its images; the
            method's part of the step.
        ema_decay: decay of a moving average of the weights; 0 keeps no average.
        mask: what the run hides, for its weights files; None if it hides nothing.

    Attributes:
        averaged: the model with averaged weights, in evaluation mode; None if no average is kept.
    """

    def __init__(
        self,
        model: ImageModel,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        schedule: Schedule,
        world: World,
        loss_of: LossOf,
        ema_decay: float = 0.0,
        mask: MaskConfig | None = None,
    ) -> None:
        self.model, self.wrapped, self.optimizer = model, wrapped, optimizer
        self.config, self.schedule, self.world = config, schedule, world
        self.loss_of = loss_of
        self.ema_decay, self.mask = ema_decay, mask
        self.averaged: ImageModel | None = None
        if ema_decay:
            self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.loss_scale = LossScale(world.device, config.train.precision)
        self.step = 0
        # skipped steps so far; how many were skipped in a row up to now, and at most
        self.skipped = torch.zeros((), device=world.device)
        self.bad_in_a_row = torch.zeros((), device=world.device)
        self.longest_bad_run = torch.zeros((), device=world.device)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train."""
        for group in self.optimizer.param_groups:
            yield from group["params"]


@dataclass(frozen=True)
class Metrics:
    """The results of a step, as device scalars: reading them is the only synchronisation.

    Attributes:
        loss: mean over the global batch.
        grad_norm: global norm before clipping.
        finite: whether the update was made.
        lr: learning rate of the step.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    lr: float


def train_step(state: TrainState, batches: Sequence[Batch]) -> Metrics:
    """Make one optimiser step from the micro-batches of this process.

    The update is that of the whole batch over all processes and micro-batches. Empty slots carry
    no weight: gradients are divided by the number of images that are there.

    Args:
        state: the run's state, which is changed in place.
        batches: `accumulation_steps` micro-batches of equal size.

    Returns:
        The step's metrics, equal in every process.
    """
    config, world = state.config, state.world
    seed_step(config.seed, state.step, world)
    statistics = running_statistics.keep(state.model)
    lr = state.schedule.lr_at(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = state.schedule.rate_of(group, state.step)
    size = len(batches[0].ids)
    share = torch.zeros(2, device=world.device)  # Σ loss·weight, Σ weight; 1 = a full micro-batch
    for number, batch in enumerate(batches):
        weight = batch.num_valid / size
        with _gradient_sync(state.wrapped, last=number == len(batches) - 1):
            with precision.autocast(world.device, config.train.precision):
                loss: Any = state.loss_of(state, batch, number)
            (loss * (state.loss_scale.scale * (weight / len(batches)))).backward()
        share += torch.stack([loss.detach() * weight, loss.new_full((), weight)])
    share = all_reduce_sum(share, world)
    present = share[1] / (len(batches) * world.size)  # exactly 1 when every slot held an image
    metrics = _update(state, share[0] / share[1], present, lr)
    running_statistics.settle(state.model, statistics, metrics.finite, world)
    if state.averaged is not None:
        _copy_buffers(state.averaged, state.model)
    return metrics


def _update(state: TrainState, loss: Tensor, present: Tensor, lr: float) -> Metrics:
    optimizer: Any = state.optimizer
    gradients = [p.grad for p in state.parameters() if p.grad is not None]
    # gradients still carry the loss scale, and count empty slots as images
    divisor = state.loss_scale.scale * present
    # the op has no Triton kernel: with "triton" it chooses a backend by itself
    plain = "reference" if state.config.kernels.backend == "reference" else None
    grad_norm = gradient_norm(gradients, backend=plain) / divisor
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
    if state.config.train.clip_norm:
        # as torch.nn.utils.clip_grad_norm_ does, with its 1e-6
        divisor = divisor * ((grad_norm + 1e-6) / state.config.train.clip_norm).clamp(min=1.0)
    optimizer.grad_scale = divisor
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad()
    if state.averaged is not None:
        _average(state.averaged, state.model, state.ema_decay, state.step, finite)
    state.loss_scale.update(finite)
    bad = (~finite).float()
    state.skipped = state.skipped + bad
    state.bad_in_a_row = (state.bad_in_a_row + 1) * bad
    state.longest_bad_run = torch.maximum(state.longest_bad_run, state.bad_in_a_row)
    state.step += 1
    return Metrics(loss, grad_norm, finite, lr)


@torch.no_grad()
def _average(
    averaged: nn.Module, model: nn.Module, decay: float, step: int, finite: Tensor
) -> None:
    # a young average follows faster; a skipped step changes nothing
    decay = min(decay, (1 + step) / (10 + step))
    old: list[Tensor] = list(averaged.parameters())
    new: list[Tensor] = list(model.parameters())
    change = torch._foreach_sub(new, old)
    # a factor of 0 would turn infinite changes into NaN
    parts = [torch.where(finite, c * (1.0 - decay), 0.0) for c in change]
    torch._foreach_add_(old, parts)


def _copy_buffers(averaged: nn.Module, model: nn.Module) -> None:
    # running statistics are averages already
    for old, new in zip(averaged.buffers(), model.buffers(), strict=True):
        old.copy_(new)


def seed_step(seed: int, step: int, world: World) -> None:
    """Seed torch's generators for a step, as stochastic depth uses them.

    Randomness is a function of (seed, step, rank), so a resumed run needs no generator state.
    """
    torch.manual_seed(signed(fold(STREAM, seed, step, world.rank)))


def _gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Let DDP average gradients only in the last backward pass of a step."""
    inner = getattr(model, "_orig_mod", model)
    if not last and isinstance(inner, DistributedDataParallel):
        return inner.no_sync()
    return nullcontext()
