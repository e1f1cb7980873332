"""The tensors that a forward pass keeps for the backward pass."""

from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_tensors(forward: Callable[[], object]) -> list[Tensor]:
    """Run a forward pass and return every tensor that autograd saves.

    The list keeps the tensors alive, so that no two storages have the same address.
    """
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return kept
