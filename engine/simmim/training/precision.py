"""Compute types: autocast, and the loss scale of fp16, kept on the device."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from simmim_kernels.weight_copies import WeightCopies

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

GROWTH_INTERVAL = 2000


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast to a named compute type; does nothing for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def weight_copies(weights: Iterable[Tensor], device: torch.device, precision: str) -> WeightCopies:
    """Copies in the compute type for the ops of a step on a GPU; elsewhere, of nothing."""
    if device.type == "cpu" or precision == "float32":
        return WeightCopies((), torch.float32)
    return WeightCopies((w for w in weights if w.dim() <= 2), DTYPES[precision])


class LossScale:
    """The factor of the loss that keeps fp16 gradients in range; a constant 1 otherwise.

    It is halved after a step with non-finite gradients and doubled after 2000 steps without one
    (the rule of torch.amp.GradScaler). Nothing is read back to the host.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.scale = torch.tensor(2.0**16 if self.dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Adapt to a step whose gradients were finite (bool scalar) or not."""
        if not self.dynamic:
            return
        good_steps = torch.where(finite, self.good_steps + 1, 0.0)
        grow = good_steps >= GROWTH_INTERVAL
        # in place: a CUDA graph reads and writes the same memory at every step
        self.scale *= torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.good_steps.copy_(torch.where(grow, 0.0, good_steps))

    def state(self) -> dict[str, float]:
        """Plain values for a checkpoint; empty where the scale is constant."""
        if not self.dynamic:
            return {}
        return {"scale": float(self.scale), "good_steps": float(self.good_steps)}

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state`, if its run and this one both have a dynamic scale."""
        if self.dynamic and state:
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(state["good_steps"])
