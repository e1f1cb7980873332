"""What all rows of bench/throughput.py have in common."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.peer import Pair, Weights
from bench.steps.images import Images
from simmim.backbone.build import Spec
from simmim.config.sections import Config


class Row(ABC):
    """One line of the table: a model, its optimiser, and one training step of both.

    Attributes:
        name: printed name.
        note: what a reader of the row must know.
        model: the module that holds the parameters.
        called: the module that a step calls: the model, or its compiled form.
        spec: our architecture that the model equals.
        pairs: for each parameter of the model, how it follows from our parameters.
        optimizer: optimiser of these parameters.
        plain: for a compiled row, the row that it compiles; else None.
    """

    name: str
    note: str
    model: nn.Module
    called: nn.Module
    spec: Spec
    pairs: list[Pair]
    optimizer: torch.optim.Optimizer
    plain: "Row | None" = None

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device

    @abstractmethod
    def load(self, weights: Weights) -> None:
        """Copy the weights of one of our models into this row; both have the same spec."""

    @abstractmethod
    def forward(self, images: Images, dtype: str) -> Tensor:
        """The loss, with its autograd graph."""

    @abstractmethod
    def step(self, images: Images) -> Callable[[], Tensor]:
        """A function that makes one optimisation step on these images and returns the loss."""

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """A copy of the weights and of the optimiser state."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: tuple[Weights, dict[str, Any]]) -> None:
        """Go back to a state that `state` returned."""
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])

    def is_finite(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def compiled(self) -> "Row":
        """A row with the same parameters and optimiser whose model goes through torch.compile."""
        row = copy.copy(self)
        row.name, row.plain = f"{self.name} + compile", self
        # every batch size gets its own code, as in a run that has only this size
        row.called = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        return row
