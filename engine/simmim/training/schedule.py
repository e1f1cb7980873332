"""Learning rate of every step: a pure function of the step, equal to the published schedules."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from simmim.config.sections import RunConfig


@dataclass(frozen=True)
class Schedule:
    """A resolved schedule; lengths are in optimiser steps, rates include the batch scaling.

    Attributes:
        name: "cosine", "multistep", "linear", "step" or "constant".
        total_steps: steps of the run.
        warmup_steps: steps of the linear warm-up.
        lr: peak rate.
        warmup_lr: rate of the first step (if there is a warm-up).
        min_lr: rate at the end of the cosine.
        milestones: steps at which "multistep" drops the rate.
        decay_steps: steps between the drops of "step".
        gamma: factor of each drop.
        warmup_prefix: whether the cosine starts at its peak after the warm-up.
    """

    name: str
    total_steps: int
    warmup_steps: int
    lr: float
    warmup_lr: float
    min_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    decay_steps: int = 1
    gamma: float = 0.1
    warmup_prefix: bool = False

    def value_at(self, update: int, scale: float = 1.0) -> float:
        """The rate the published scheduler sets at its update number `update` (0, 1, …).

        Args:
            update: number of the scheduler's update.
            scale: factor of the peak rate, from layer decay; the first and the last rate are not
                scaled, as published.
        """
        if scale != 1.0:
            return replace(self, lr=self.lr * scale).value_at(update)
        if update < self.warmup_steps:
            return self.warmup_lr + update * (self.lr - self.warmup_lr) / self.warmup_steps
        if self.name == "cosine":
            total = self.total_steps
            if self.warmup_prefix:
                # the published prefix form counts from the end of the warm-up to the end of the run
                update -= self.warmup_steps
                total = self.total_steps - self.warmup_steps
            if update >= total:
                return self.min_lr
            share = 0.5 * (1.0 + math.cos(math.pi * update / total))
            return self.min_lr + (self.lr - self.min_lr) * share
        if self.name == "linear":
            share = (update - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            return self.lr - (self.lr - self.lr * 0.01) * share
        if self.name == "step":
            return float(self.lr * self.gamma ** (update // self.decay_steps))
        if self.name == "multistep":
            return float(self.lr * self.gamma ** bisect_right(self.milestones, update))
        return self.lr

    def lr_at(self, step: int, scale: float = 1.0) -> float:
        """The rate that step number `step` (0, 1, …) uses, with the peak rate times `scale`.

        The published loop updates the schedule after each step with the number of that step, so
        the first two steps both use the initial value.
        """
        return self.value_at(max(step - 1, 0), scale)

    def rate_of(self, group: Mapping[str, Any], step: int) -> float:
        """The rate of a group of parameters in step `step`.

        A group's "lr_scale" scales the rates; with "fixed_lr" it keeps the peak rate.
        """
        scale: float = group.get("lr_scale", 1.0)
        return self.lr * scale if group.get("fixed_lr") else self.lr_at(step, scale)


def resolve_schedule(config: RunConfig, num_images: int) -> Schedule:
    """The schedule of a run over `num_images` images."""
    steps_per_epoch = num_images / config.train.batch_size
    total = config.train.steps or max(1, int(config.train.epochs * steps_per_epoch))
    schedule, optim = config.schedule, config.optim
    scale = config.train.batch_size / optim.lr_batch if optim.lr_batch else 1.0
    return Schedule(
        name=schedule.name,
        total_steps=total,
        warmup_steps=schedule.warmup_steps or int(schedule.warmup_epochs * steps_per_epoch),
        lr=optim.lr * scale,
        warmup_lr=schedule.warmup_lr * scale,
        min_lr=schedule.min_lr * scale,
        milestones=tuple(epoch * steps_per_epoch for epoch in schedule.milestones),
        decay_steps=max(1, int(schedule.step_epochs * steps_per_epoch)),
        gamma=schedule.gamma,
        warmup_prefix=schedule.warmup_prefix,
    )
