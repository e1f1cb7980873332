"""The rows of bench/throughput.py: a model, its optimiser and one training step over ready images.

B batch, C channels, H W pixels, h w mask grid.
"""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peer import Pair, Peer, Weights, take
from simmim.backbone.build import Spec
from simmim.config.sections import Config, KernelsConfig
from simmim.config.spec import resolve_spec
from simmim.data.batch import Batch
from simmim.distributed import World
from simmim.method.build import find_method
from simmim.method.simsiam import SimSiamMethod
from simmim.model.image_model import ImageModel, MaskedImageModel
from simmim.pretrain import build_state
from simmim.training import precision
from simmim.training.step import TrainState, train_step

FORMAT_NAMES = {torch.contiguous_format: "contiguous", torch.channels_last: "channels-last"}
# Timed passes in each memory format before one is chosen.
FORMAT_TRIALS = 3
# Of norms that begin at 0.
WOKEN_WEIGHT = 0.2


@dataclass(frozen=True)
class Images:
    """The same images in the forms that rows take.

    Attributes:
        batch: as the engine's loader hands them on: uint8 [B, *shape of the method's view], and
            ids.
        ready: what models are called with by pipelines that prepare it all: normalised images,
            float32 [B, C, H, W], and the mask, bool [B, h, w]; of SimSiam two normalised views.
    """

    batch: Batch
    ready: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, count: int, model: ImageModel, config: Config) -> "Images":
        """Random images on the model's device, and the masks or views that the engine draws."""
        device, method = model.mean.device, find_method(config)
        shape = (count, *method.view().shape)
        generator = torch.Generator().manual_seed(count)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if isinstance(method, SimSiamMethod):
            image = _tint(image, generator)
        image = image.to(device)
        ids = torch.arange(count, device=device)
        batch = Batch(image, ids, torch.zeros_like(ids), count)
        if isinstance(method, SimSiamMethod):
            first, second = method.distorted(image, batch.ids, batch.epochs)
            return cls(batch, (model.normalise(first), model.normalise(second)))
        assert isinstance(model, MaskedImageModel)
        masked: Any = method
        mask = model.token_mask(masked.draw_mask(batch.ids, batch.epochs))
        return cls(batch, (model.normalise(image.permute(0, 3, 1, 2)).contiguous(), mask))


def _tint(image: Tensor, generator: torch.Generator) -> Tensor:
    """Every image, uint8 [B, 2, H, W, C], with a colour and a contrast of its own.

    Plain noise is all the same to a network, and batch norms over features that are all the same
    leave nothing but rounding errors to compare.
    """
    channels = image.shape[-1]
    colour = torch.rand(len(image), 1, 1, 1, channels, generator=generator)
    contrast = torch.rand(len(image), 1, 1, 1, 1, generator=generator)
    return (image * contrast + 255 * colour * (1 - contrast)).to(torch.uint8)


class Row(ABC):
    """One line of the table: a model, its optimiser, and the step over them.

    Attributes:
        name: as printed.
        note: what a reader of the row must know.
        model: holds the parameters.
        called: the same model as it is called, perhaps compiled.
        spec: the architecture of ours that the model equals.
        pairs: the model's parameters as ours.
        optimizer: over those.
        plain: of a compiled row, the row it compiles.
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
        """Copy the weights of a model of ours that has this row's spec."""

    @abstractmethod
    def forward(self, images: Images, dtype: str) -> Tensor:
        """The loss, with its graph."""

    @abstractmethod
    def step(self, images: Images) -> Callable[[], Tensor]:
        """A function that makes one optimisation step from these images and returns the loss."""

    def state(self) -> tuple[Weights, dict[str, Any]]:
        """A copy of weights and optimiser state."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: tuple[Weights, dict[str, Any]]) -> None:
        """Go back to what `state` gave."""
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])

    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def compiled(self) -> "Row":
        """A row on the same parameters and optimiser that goes through torch.compile."""
        row = copy.copy(self)
        row.name, row.plain = f"{self.name} + compile", self
        # each batch size gets code of its own, as a run with that one size would
        row.called = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        return row


class EngineRow(Row):
    """The engine's own step over what pretrain.py builds.

    Attributes:
        method: of the run.
        distorts: of SimSiam, whether the step makes its views from crops; else they are ready, as
            those of the peers are.
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
        self.model, self.called = wake(self.run.model.train()), self.run.wrapped
        self.optimizer = self.run.optimizer
        trained = (n for n, p in self.model.named_parameters() if p.requires_grad)
        self.pairs = [Pair(name, take(name)) for name in trained]

    def through_references(self, name: str) -> "EngineRow":
        """The same model and step with every op in plain PyTorch."""
        config = replace(self.config, kernels=KernelsConfig(backend="reference"))
        row = EngineRow(name, config, self.device)
        row.note = "the same model and step with kernels.backend=reference"
        return row

    def with_distortion(self, name: str) -> "EngineRow":
        """A row of SimSiam on the same parameters whose step distorts uint8 crops by itself."""
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


class PeerRow(Row):
    """Another package's model in a training step of plain PyTorch."""

    def __init__(self, peer: Peer, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.name, self.note, self.spec, self.pairs = peer.name, peer.note, peer.spec, peer.pairs
        self.peer, self.format = peer, torch.contiguous_format
        self.model = self.called = peer.model.to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optim = config.optim
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.ndim > 1]},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def load(self, weights: Weights) -> None:
        self.peer.load(weights)

    def choose_format(self, images: Images) -> str:
        """Go to the fastest memory format that the peer's users choose among.

        Returns:
            What was measured, in words; "" where there is nothing to choose.
        """
        if len(self.peer.formats) < 2:
            return ""
        found = {}
        for chosen in self.peer.formats:
            self._use(chosen)
            found[chosen] = self._seconds(images)
        self._use(min(found, key=lambda chosen: found[chosen]))
        times = ", ".join(f"{FORMAT_NAMES[f]} {1e3 * t:.1f} ms" for f, t in found.items())
        self.note += f"; {FORMAT_NAMES[self.format]}, the faster here"
        return f"forward and backward {times}"

    def _use(self, chosen: torch.memory_format) -> None:
        self.format = chosen
        self.model.to(memory_format=chosen)  # type: ignore[call-overload]

    def _seconds(self, images: Images) -> float:
        """Of the fastest of some forward and backward passes after a warm-up."""
        arguments, seconds = self._arguments(images), []
        for _ in range(1 + FORMAT_TRIALS):
            begin = time.perf_counter()
            with precision.autocast(self.device, self.config.train.precision):
                loss: Tensor = self.called(*arguments)
            loss.backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            self.model.zero_grad(set_to_none=True)
        return min(seconds[1:])

    def _arguments(self, images: Images) -> list[Tensor]:
        image, second = images.ready
        arguments = (image, self.peer.mask_form(second))
        return [x.contiguous(memory_format=self.format) if x.dim() == 4 else x for x in arguments]

    def forward(self, images: Images, dtype: str) -> Tensor:
        arguments = self._arguments(images)
        with precision.autocast(self.device, dtype):
            loss: Tensor = self.called(*arguments)
        return loss

    def step(self, images: Images) -> Callable[[], Tensor]:
        arguments, train = self._arguments(images), self.config.train

        def step() -> Tensor:
            with precision.autocast(self.device, train.precision):
                loss: Tensor = self.called(*arguments)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, train.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step


def wake(model: ImageModel) -> ImageModel:
    """Give norms whose weight begins at 0 a small one.

    Behind such a norm lies a branch that has no gradient yet, and nothing there could be compared.
    With a weight of 1, a fresh ResNet would multiply rounding errors from block to block.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.any():
            nn.init.constant_(weight, WOKEN_WEIGHT)
    return model


def engine_loss(
    model: nn.Module, images: Images, config: Config, dtype: str, *, distorts: bool = False
) -> Tensor:
    """The loss of a model of ours, called as train_step calls it.

    Args:
        model: perhaps compiled.
        images: what it is of.
        config: of the run.
        dtype: of autocast.
        distorts: of SimSiam, whether to make the views from crops instead of taking them ready.
    """
    method = find_method(config)
    with precision.autocast(images.batch.image.device, dtype):
        if isinstance(method, SimSiamMethod) and not distorts:
            loss: Tensor = model(*images.ready)
        else:
            loss = method.loss(model, images.batch)
    return loss
