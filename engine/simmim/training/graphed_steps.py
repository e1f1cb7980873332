"""Makes a run's steps: each kernel launched by itself, or all of a step at once as a CUDA graph.

A graph holds `device_step` with its addresses: before each launch the host copies the step's images
and numbers to where the graph reads them, and after it copies the metrics from where they are
written. The first steps are made without it, since libraries allocate and choose kernels then, and
so is every step that is not like the one in the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from simmim.data.batch import Batch
from simmim.errors import ConfigError
from simmim.training.parallel import step_stream
from simmim.training.step import Metrics, TrainState, begin_step, device_step, train_step

# Steps before the capture. DistributedDataParallel settles its buckets in its first ones; torch
# asks for 11.
WARM_UP = 3
WARM_UP_DISTRIBUTED = 11


class GraphedSteps:
    """Makes steps as `train_step` does, from a CUDA graph where it can.

    Args:
        state: the run's state; from the first step on, its tensors must stay where they are.
        report: called with one line when there is no graph although one was expected.

    Raises:
        ConfigError: train.cuda_graph=on, and there cannot be one.

    Attributes:
        reason: why no graph is used; None while one is.
    """

    def __init__(self, state: TrainState, report: Callable[[str], None]) -> None:
        self.state, self._report = state, report
        self.reason = reason_against(state)
        if self.reason is not None and state.config.train.cuda_graph == "on":
            raise ConfigError(f"train.cuda_graph=on: {self.reason}")
        distributed = isinstance(state.wrapped, DistributedDataParallel)
        self._warm_up = WARM_UP_DISTRIBUTED if distributed else WARM_UP
        self._stream: Any = None
        if self.reason is None:
            self._stream = step_stream(state.world.device)
        self._graph: Any = None
        self._layout: object = None
        self._batches: list[Batch] = []
        self._metrics = torch.zeros(0)

    def describe(self) -> str:
        """Whether there will be a graph, for the log."""
        return f"off, {self.reason}" if self.reason else f"on after {self._warm_up} steps"

    def __call__(self, batches: Sequence[Batch]) -> Metrics:
        """See `train_step`."""
        full = all(batch.num_valid == len(batch.ids) for batch in batches)
        if self.reason is not None or not full:
            return self._eagerly(batches)
        if self._warm_up:
            self._warm_up -= 1
            return self._eagerly(batches)
        layout = [_layout(batch) for batch in batches]
        if self._layout != layout:
            try:
                self._capture(batches)
            except Exception as error:  # CUDA's, or of any code that the step calls
                self._give_up(error)
                return self._eagerly(batches)
            self._layout = layout
        return self._launch(batches)

    def _eagerly(self, batches: Sequence[Batch]) -> Metrics:
        """A step without a graph, on the stream of the capture if there is to be or was one.

        What libraries keep for a stream, and where gradients are summed, is then the same.
        """
        if self._stream is None:
            return train_step(self.state, batches)
        here = torch.cuda.current_stream(self.state.world.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            metrics = train_step(self.state, batches)
        here.wait_stream(self._stream)
        return metrics

    def _capture(self, batches: Sequence[Batch]) -> None:
        self._graph, self._layout = None, None  # its memory goes before more is taken
        self._batches = [
            Batch(batch.image.clone(), batch.ids.clone(), batch.epochs.clone(), batch.num_valid)
            for batch in batches
        ]
        begin_step(self.state, batches)
        graph = torch.cuda.CUDAGraph()
        # other threads (of the data path) may go on allocating and copying
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            loss, grad_norm, finite = device_step(self.state, self._batches)
            self._metrics = torch.stack([loss, grad_norm, finite.to(loss.dtype)])
        self._graph = graph

    def _launch(self, batches: Sequence[Batch]) -> Metrics:
        for given, own in zip(batches, self._batches, strict=True):
            own.image.copy_(given.image)
            own.ids.copy_(given.ids)
            own.epochs.copy_(given.epochs)
        lr = begin_step(self.state, batches)
        self._graph.replay()
        self.state.step += 1
        loss, grad_norm, finite = self._metrics.clone().unbind()
        return Metrics(loss, grad_norm, finite != 0, lr)

    def _give_up(self, error: Exception) -> None:
        self._graph, self._batches = None, []
        for parameter in self.state.parameters():
            parameter.grad = None  # of the graph's memory
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self.reason = f"it could not be captured: {lines[0]}"
        if self.state.config.train.cuda_graph == "on":
            raise ConfigError(f"train.cuda_graph=on: {self.reason}") from error
        self._report(f"train.cuda_graph: off, {self.reason}")


def reason_against(state: TrainState) -> str | None:
    """Why the steps of a run cannot be a CUDA graph; None where they can."""
    train, world = state.config.train, state.world
    if train.cuda_graph == "off":
        return "train.cuda_graph=off"
    if world.device.type != "cuda":
        return "it is for CUDA"
    if train.compile:
        return "train.compile is on"
    if world.size > 1 and torch.distributed.get_backend() != "nccl":
        return "processes do not communicate by NCCL"
    reason: str | None = getattr(state.loss_of, "changes_on_host", None)
    return reason


def _layout(batch: Batch) -> tuple[Any, ...]:
    """What the tensors of another batch must be to take these ones' place."""
    tensors: tuple[Tensor, ...] = (batch.image, batch.ids, batch.epochs)
    return tuple((t.shape, t.dtype, t.stride()) for t in tensors)
