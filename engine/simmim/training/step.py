"""One optimisation step: accumulate, backward, clip once, check, update. Nothing is read back.

The optimiser is fused and takes two tensors, as in the protocol of torch.amp.GradScaler: it divides
gradients by `grad_scale`, and it leaves weights and state unchanged if `found_inf` is not 0.
Unscaling, clipping and skipping therefore need no extra pass and no synchronisation.

A step has two halves. `begin_step` is the host's: it writes all numbers that differ from step to
step to the device. `device_step` is the device's: it depends on no such number, and changes state
in place, so that a CUDA graph can hold it (graphed_steps.py).
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


class StepInputs:
    """The numbers that differ from step to step, on the device, always at the same addresses.

    Args:
        num_groups: of the optimiser's parameters.
        accumulation_steps: micro-batches of a step.
        device: where they lie.

    Attributes:
        rates: [num_groups], learning rates; on a CPU float64, as which its fused optimisers read
            them, elsewhere float32.
        weights: float32 [accumulation_steps], the share of a micro-batch's slots with an image.
        shares: weights / accumulation_steps.
        to_average: float32 scalar, how far an average moves towards the weights.
    """

    def __init__(self, num_groups: int, accumulation_steps: int, device: torch.device) -> None:
        wide = torch.float64 if device.type == "cpu" else torch.float32
        self.rates = torch.zeros(num_groups, dtype=wide, device=device)
        self._others = torch.zeros(2 * accumulation_steps + 1, device=device)
        self._host_rates = torch.zeros(num_groups, dtype=wide)
        self._host_others = torch.zeros(2 * accumulation_steps + 1)
        self.weights = self._others[:accumulation_steps]
        self.shares = self._others[accumulation_steps:-1]
        self.to_average = self._others[-1]

    def fill(self, rates: Sequence[float], weights: Sequence[float], to_average: float) -> None:
        """Write the numbers of a step; the host does not wait."""
        shares = (weight / len(weights) for weight in weights)
        self._host_rates.numpy()[:] = rates
        self._host_others.numpy()[:] = [*weights, *shares, to_average]
        # a few bytes of memory that is not pinned are taken before the copy returns
        self.rates.copy_(self._host_rates, non_blocking=True)
        self._others.copy_(self._host_others, non_blocking=True)


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
        in_ops = () if config.kernels.backend == "reference" else self.parameters()
        self.weight_copies = precision.weight_copies(in_ops, world.device, config.train.precision)
        self.step = 0
        # skipped steps so far; how many were skipped in a row up to now, and at most
        self.skipped = torch.zeros((), device=world.device)
        self.bad_in_a_row = torch.zeros((), device=world.device)
        self.longest_bad_run = torch.zeros((), device=world.device)
        self._inputs: dict[int, StepInputs] = {}
        self.has_batch_norms = running_statistics.has_batch_norm(model)

    def inputs(self, accumulation_steps: int) -> StepInputs:
        """What the host tells a step of so many micro-batches."""
        if accumulation_steps not in self._inputs:
            groups = len(self.optimizer.param_groups)
            made = StepInputs(groups, accumulation_steps, self.world.device)
            self._inputs[accumulation_steps] = made
        return self._inputs[accumulation_steps]

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
    lr = begin_step(state, batches)
    loss, grad_norm, finite = device_step(state, batches)
    state.step += 1
    return Metrics(loss, grad_norm, finite, lr)


def begin_step(state: TrainState, batches: Sequence[Batch]) -> float:
    """The host's half of a step: write what `device_step` reads; return the learning rate."""
    seed_step(state.config.seed, state.step, state.world)
    groups, schedule = state.optimizer.param_groups, state.schedule
    inputs = state.inputs(len(batches))
    # a young average follows faster
    decay = min(state.ema_decay, (1 + state.step) / (10 + state.step))
    inputs.fill(
        rates=[schedule.rate_of(group, state.step) for group in groups],
        weights=[batch.num_valid / len(batch.ids) for batch in batches],
        to_average=1.0 - decay,
    )
    for group, rate in zip(groups, inputs.rates, strict=True):
        group["lr"] = rate
    return schedule.lr_at(state.step)


def device_step(state: TrainState, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """The device's half of a step; return loss, grad_norm and finite of `Metrics`."""
    config, world = state.config, state.world
    inputs = state.inputs(len(batches))
    statistics = running_statistics.keep(state.model) if state.has_batch_norms else []
    share = torch.zeros(2, device=world.device)  # Σ loss·weight, Σ weight; 1 = a full micro-batch
    with state.weight_copies.in_use():
        for number, batch in enumerate(batches):
            with _gradient_sync(state.wrapped, last=number == len(batches) - 1):
                with precision.autocast(world.device, config.train.precision):
                    loss: Any = state.loss_of(state, batch, number)
                # in this thread: a handover to the engine's own costs more than it overlaps
                with torch.autograd.set_multithreading_enabled(False):
                    (loss * (state.loss_scale.scale * inputs.shares[number])).backward()
            weight = inputs.weights[number]
            share += torch.stack([loss.detach() * weight, weight])
    share = all_reduce_sum(share, world)
    present = share[1] / (len(batches) * world.size)  # exactly 1 when every slot held an image
    loss = share[0] / share[1]
    grad_norm, finite = _update(state, loss, present, inputs.to_average)
    if statistics:
        running_statistics.settle(state.model, statistics, finite, world)
    if state.averaged is not None:
        _copy_buffers(state.averaged, state.model)
    return loss, grad_norm, finite


def _update(
    state: TrainState, loss: Tensor, present: Tensor, to_average: Tensor
) -> tuple[Tensor, Tensor]:
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
    bad = (~finite).float()
    optimizer.grad_scale = divisor
    optimizer.found_inf = bad
    optimizer.step()
    optimizer.zero_grad()
    if state.averaged is not None:
        _average(state.averaged, state.model, to_average, finite)
    state.loss_scale.update(finite)
    state.skipped += bad
    state.bad_in_a_row.add_(1).mul_(bad)
    torch.maximum(state.longest_bad_run, state.bad_in_a_row, out=state.longest_bad_run)
    return grad_norm, finite


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, to_average: Tensor, finite: Tensor) -> None:
    old: list[Tensor] = list(averaged.parameters())
    new: list[Tensor] = list(model.parameters())
    change = torch._foreach_sub(new, old)
    # a skipped step changes nothing; a factor of 0 would turn infinite changes into NaN
    parts = [torch.where(finite, c * to_average, 0.0) for c in change]
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
