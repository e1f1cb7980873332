"""The engine's rows of bench/throughput.py."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.peers.peer import Pair, Weights, take
from bench.steps.images import Images
from bench.steps.row import Row
from simmim.config.sections import Config, KernelsConfig
from simmim.config.spec import resolve_spec
from simmim.data.batch import Batch
from simmim.distributed import World
from simmim.method.build import find_method
from simmim.method.simsiam import SimSiamMethod
from simmim.model.image_model import ImageModel
from simmim.pretrain import build_state
from simmim.training import precision
from simmim.training.step import TrainState, train_step

# Weight of norms that would begin at 0.
RAISED_WEIGHT = 0.2


class EngineRow(Row):
    """The engine's own step, on the state that a pre-training run builds.

    Attributes:
        method: the method of the run.
        distorts: for SimSiam, whether the step makes its views from crops. If not, the views are
            ready before the step, as they are for the peers.
    """

    model: ImageModel

    def __init__(self, name: str, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.name, self.spec, self.method = name, resolve_spec(config), find_method(config)
        self.distorts = False
        self.note = "the engine's train_step, backends chosen by itself"
        if isinstance(self.method, SimSiamMethod):
            self.note += "; two views ready"
        self.run = build_state(config, config.train.batch_size, World(0, 1, device))
        self.model, self.called = raise_zero_norms(self.run.model.train()), self.run.wrapped
        self.optimizer = self.run.optimizer
        trained = (n for n, p in self.model.named_parameters() if p.requires_grad)
        self.pairs = [Pair(name, take(name)) for name in trained]

    def through_references(self, name: str) -> "EngineRow":
        """A row with the same model and step, whose ops all run in plain PyTorch."""
        config = replace(self.config, kernels=KernelsConfig(backend="reference"))
        row = EngineRow(name, config, self.device)
        row.note = "the same model and step with kernels.backend=reference"
        return row

    def with_distortion(self, name: str) -> "EngineRow":
        """A row of SimSiam with the same parameters, whose step distorts uint8 crops itself."""
        row = copy.copy(self)
        row.name, row.distorts = name, True
        row.note = "the whole step, from uint8 crops: jitter, grey and blur on the device as well"
        return row

    def load(self, weights: Weights) -> None:
        self.model.load_state_dict(weights)

    def forward(self, images: Images, dtype: str) -> Tensor:
        return engine_loss(self.called, images, self.config, dtype, distorts=self.distorts)

    def step(self, images: Images) -> Callable[[], Tensor]:
        state = copy.copy(self.run)
        state.wrapped = self.called
        if isinstance(self.method, SimSiamMethod) and not self.distorts:

            def loss_of(state: TrainState, batch: Batch, number: int) -> Tensor:
                loss: Tensor = state.wrapped(*images.ready)
                return loss

            state.loss_of = loss_of
        return lambda: train_step(state, [images.batch]).loss


def raise_zero_norms(model: ImageModel) -> ImageModel:
    """Give norms whose weight begins at 0 a small weight instead.

    The branch that ends in such a norm has no gradient at first, so nothing in it could be
    compared. A weight of 1 is too much: a fresh ResNet would multiply rounding errors from block
    to block.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.any():
            nn.init.constant_(weight, RAISED_WEIGHT)
    return model


def engine_loss(
    model: nn.Module, images: Images, config: Config, dtype: str, *, distorts: bool = False
) -> Tensor:
    """The loss of one of our models, called in the way of `train_step`.

    Args:
        model: the model, or its compiled form.
        images: the images of the step.
        config: the configuration of the run.
        dtype: the dtype of autocast.
        distorts: for SimSiam, whether to make the views from crops or to take the ready ones.
    """
    method = find_method(config)
    with precision.autocast(images.batch.image.device, dtype):
        if isinstance(method, SimSiamMethod) and not distorts:
            loss: Tensor = model(*images.ready)
        else:
            loss = method.loss(model, images.batch)
    return loss
