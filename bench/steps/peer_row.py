"""The rows of bench/throughput.py for models of other packages."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers.peer import Peer, Weights
from bench.steps.images import Images
from bench.steps.row import Row
from simmim.config.sections import Config
from simmim.training import precision

FORMAT_NAMES = {torch.contiguous_format: "contiguous", torch.channels_last: "channels-last"}
# How many passes are timed in each memory format before one is chosen.
FORMAT_TRIALS = 3


class PeerRow(Row):
    """The model of another package, in a training step of plain PyTorch."""

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
        """Time the memory formats that the peer's users choose from, and take the fastest.

        Returns:
            What was measured, in words; "" if there is only one format.
        """
        if len(self.peer.formats) < 2:
            return ""
        seconds = {}
        for chosen in self.peer.formats:
            self._use(chosen)
            seconds[chosen] = self._seconds(images)
        self._use(min(seconds, key=lambda chosen: seconds[chosen]))
        times = ", ".join(f"{FORMAT_NAMES[f]} {1e3 * s:.1f} ms" for f, s in seconds.items())
        self.note += f"; {FORMAT_NAMES[self.format]}, the faster here"
        return f"forward and backward {times}"

    def _use(self, chosen: torch.memory_format) -> None:
        self.format = chosen
        self.model.to(memory_format=chosen)  # type: ignore[call-overload]

    def _seconds(self, images: Images) -> float:
        """Time of the fastest of some forward and backward passes, after a warm-up."""
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
