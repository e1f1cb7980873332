"""LAMB: AdamW whose update of a tensor is as long, relative to the tensor, as the learning rate.

Source: You et al. 2019 (arXiv 1904.00962), algorithm 2; huggingface/pytorch-image-models
timm/optim/lamb.py, which adapts decayed parameters only and corrects both moments for their start.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB that can skip a step on the device, as PyTorch's fused optimisers can.

    Before `step`, `grad_scale` may be set to what gradients are divided by, and `found_inf` to a
    scalar that is not 0 where the step is to change nothing, state included; both are tensors on
    the device and nothing is read back. There is no clipping: the gradient norm is the step's part.

    Args:
        params: parameters or groups; a group without weight decay is not adapted: its update is
            that of Adam.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: added to the direction, times the parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        gradients, made = self._gradients(parameters)
        # factors are 1 - 0 and 0 where the step is skipped: products and sums are then exact
        # as a list: alone, a scalar tensor would be read back to add it
        torch._foreach_add_(steps, [made] * len(steps))
        torch._foreach_mul_(first, 1.0 - (1.0 - beta1) * made)
        torch._foreach_add_(first, torch._foreach_mul(gradients, (1.0 - beta1) * made))
        squares = torch._foreach_mul(gradients, gradients)
        torch._foreach_mul_(squares, (1.0 - beta2) * made)
        torch._foreach_mul_(second, 1.0 - (1.0 - beta2) * made)
        torch._foreach_add_(second, squares)
        # a first step that is skipped leaves a count of 0, of which there is no correction
        count = torch.stack(steps).clamp(min=1.0)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, (1.0 - beta2**count).sqrt().unbind())
        torch._foreach_add_(roots, group["eps"])
        direction = list(torch._foreach_div(first, roots))
        torch._foreach_div_(direction, (1.0 - beta1**count).unbind())
        if group["weight_decay"]:
            torch._foreach_add_(direction, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(direction, list(_trust(parameters, direction).unbind()))
        torch._foreach_mul_(direction, made * -group["lr"])
        torch._foreach_add_(parameters, direction)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _gradients(self, parameters: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Gradients without their scale, zeros where the step is skipped; 1, or 0 where it is."""
        found = [parameter.grad for parameter in parameters]
        given = [gradient for gradient in found if gradient is not None]
        device = parameters[0].device
        if self.grad_scale is not None:
            given = list(torch._foreach_div(given, self.grad_scale.to(device)))
        if self.found_inf is None:
            return given, torch.ones((), device=device)
        bad = self.found_inf.to(device) != 0
        # not a product with 0: what is not finite would stay so
        return [torch.where(bad, 0.0, gradient) for gradient in given], (~bad).float()


def _trust(parameters: list[Tensor], direction: list[Tensor]) -> Tensor:
    """Length of every parameter over that of its direction; 1 where either is 0."""
    weight = torch.stack(torch._foreach_norm(parameters))
    change = torch.stack(torch._foreach_norm(direction))
    return torch.where((weight > 0) & (change > 0), weight / change, 1.0)
