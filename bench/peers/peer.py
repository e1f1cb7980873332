"""A model of another package, and which of our parameters each of its parameters equals.

B batch, h w mask grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simmim.backbone.build import Spec

Weights = Mapping[str, Tensor]


class Unavailable(Exception):
    """This package cannot have a row here; the message says why in one line."""


class Mismatch(Exception):
    """Two rows do not compute the same; the message says where and by how much in one line."""


@dataclass(frozen=True)
class Pair:
    """A parameter of a peer, and how it follows from our parameters.

    Its gradient follows from our gradients in the same way.

    Attributes:
        theirs: name of the parameter in the peer.
        take: our parameters (or their gradients) by name → the peer's parameter (or gradient).
        compared: False where the gradient is only rounding noise (the bias of a key cancels in the
            softmax), or where the parameter is frozen and has no gradient.
    """

    theirs: str
    take: Callable[[Weights], Tensor]
    compared: bool = True


@dataclass(frozen=True)
class Peer:
    """A model of another package that computes the same loss as our model.

    Attributes:
        name: printed name of its row.
        spec: our architecture that this model equals.
        model: (image, mask in the peer's form) → scalar loss, or (view, other view) → scalar loss.
        pairs: one pair for each parameter of the model.
        mask_form: mask, bool [B, h, w] → the form that the model takes; views stay as they are.
        note: what a reader of the row must know.
        formats: the memory formats that users of the package choose from; the row takes the
            fastest of them.
    """

    name: str
    spec: Spec
    model: nn.Module
    pairs: list[Pair]
    mask_form: Callable[[Tensor], Tensor] = lambda mask: mask
    note: str = ""
    formats: tuple[torch.memory_format, ...] = (torch.contiguous_format,)

    def load(self, weights: Weights) -> None:
        """Copy our parameters into the peer.

        Raises:
            Mismatch: a parameter of the peer has no counterpart of the same shape in our model.
        """
        parameters = dict(self.model.named_parameters())
        assert parameters.keys() == {pair.theirs for pair in self.pairs}
        for pair in self.pairs:
            target = parameters[pair.theirs]
            try:
                value = pair.take(weights)
            except KeyError as error:
                raise Mismatch(f"{self.name}: {pair.theirs}: our model has no {error}") from None
            if value.shape != target.shape:
                shapes = f"{list(target.shape)}, ours {list(value.shape)}"
                raise Mismatch(f"{self.name}: {pair.theirs} is {shapes}")
            with torch.no_grad():
                target.copy_(value)


def take(name: str) -> Callable[[Weights], Tensor]:
    """A function that takes our parameter of that name unchanged."""
    return lambda weights: weights[name]
