"""Copies of float32 weights in the dtype of a GPU's products, made at once for a whole step.

An op that meets a weight without a copy makes one for itself.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

# Of every weight whose copy is in use, by address: the copy, and the weight's version then.
_in_use: dict[int, tuple[Tensor, int]] = {}


class WeightCopies:
    """Copies of some weights, for ops that run in `in_use`.

    Args:
        weights: float32, on one device; they may change, and may not move.
        dtype: that of the products.

    Attributes:
        copies: in the order of the weights.
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype) -> None:
        self._weights = [weight.detach() for weight in weights]
        self.copies = [torch.empty_like(weight, dtype=dtype) for weight in self._weights]

    @contextmanager
    def in_use(self) -> Generator[None, None, None]:
        """Copies the weights as they are now; a weight that changes inside loses its copy."""
        if self.copies:
            torch._foreach_copy_(self.copies, self._weights)
        mine = {
            weight.data_ptr(): (copy, weight._version)
            for weight, copy in zip(self._weights, self.copies, strict=True)
        }
        _in_use.update(mine)
        try:
            yield
        finally:
            for address in mine:
                _in_use.pop(address, None)


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the dtype of products; its gradient is not that of the result."""
    if weight.dtype == dtype:
        return weight
    copy, version = _in_use.get(weight.data_ptr(), (None, 0))
    if (
        copy is not None
        and (copy.shape, copy.dtype) == (weight.shape, dtype)
        and version == weight._version
    ):
        return copy
    return weight.to(dtype)
