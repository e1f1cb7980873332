"""One op beside the published form of what it replaces."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One op at one dtype, and other ways to compute the same.

    Attributes:
        name: op and dtype.
        sides: name → function that returns output and gradients; "ours" is one of the names.
        tolerance: largest norm of the difference of ours and another side, relative to the norm.
        fewest_bytes: bytes that forward and backward must move at least; None if that says little.
        targets: the ratio to another side that ours should reach, and the share of the copy rate
            ("copy").
        compared: the part of each result that must be equal.
    """

    name: str
    sides: dict[str, Run]
    tolerance: float
    fewest_bytes: int | None
    targets: dict[str, float]
    compared: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def check(self) -> None:
        """Raise AssertionError if another side does not compute the same as ours."""
        ours = [t.clone() for t in self.sides["ours"]()]
        for name, side in self.sides.items():
            for a, b in zip(ours, side(), strict=True):
                a, b = (self.compared(t).double() for t in (a, b))
                error = float((a - b).norm() / b.norm().clamp(min=1e-30))
                assert error <= self.tolerance, f"{self.name}: ours and {name} differ by {error}"


def with_gradients(
    function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor | None = None
) -> Run:
    """A function that returns the output of `function(*leaves)` and the gradients of the leaves.

    Args:
        function: what to run.
        leaves: its arguments; leaves that require no gradient have none in the result.
        grad: gradient of the output; None if the output is a scalar loss.
    """

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def three_sides(
    ours: Callable[..., Tensor],
    published: Callable[..., Tensor],
    leaves: list[Tensor],
    grad: Tensor | None = None,
) -> dict[str, Run]:
    """Our op, and the published form in eager PyTorch and through torch.compile."""
    return {
        "ours": with_gradients(ours, leaves, grad),
        "eager": with_gradients(published, leaves, grad),
        "compile": with_gradients(torch.compile(published), leaves, grad),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Such as bfloat16."""
    return str(dtype).removeprefix("torch.")
