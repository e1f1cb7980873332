"""Records what arrives where a run would start processes, compile, or call another library.

Each is a stand-in that is cheap and tells, under a name of its own, the values that it was given.
The tests of the thing itself show that these values act.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from every_setting.case import Fingerprint
from simmim import files
from simmim.backbone import convnet, layers
from simmim.data import build as data_build
from simmim.data import finetune_views as views
from simmim.data import loader, mixing, one_pass
from simmim.data.producer import InlineProducer
from simmim.errors import DataError
from simmim.training import build, claim, graphed_steps
from simmim_kernels.op import Op

CHANNELS_LAST = torch.channels_last


def watch(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    """Put every stand-in in place; what arrives is written to `seen`."""
    _watch_workers(patch, seen)
    _watch_batches(patch, seen)
    _watch_dali(patch, seen)
    _watch_model(patch, seen)
    _watch_timm(patch, seen)
    patch.setattr(torch.cuda, "is_available", lambda: False)
    # plots, which follow no setting, take longer than all else
    patch.setitem(sys.modules, "matplotlib.figure", None)
    # a test needs no file to outlive a crash of the machine, and no description of it
    patch.setattr(files.os, "fsync", lambda descriptor: None)
    patch.setattr(claim.environment, "describe", lambda device, size: {})


def _watch_workers(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    seen["workers"], seen["prefetch"], seen["timeouts"] = [], [], []

    class Pool(InlineProducer):
        def __init__(
            self,
            samples: Any,
            micro_batch: int,
            *,
            workers: int,
            prefetch: int,
            timeout_s: float,
            report: Callable[[str], None],
            pin: bool = False,
        ) -> None:
            super().__init__(samples)
            seen["workers"].append(workers)
            seen["prefetch"].append(prefetch)
            seen["timeouts"].append(timeout_s)

    for module in (loader, one_pass):
        patch.setattr(module, "WorkerPool", Pool)


def _watch_batches(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    for module, name in ((loader, "micro-batches"), (one_pass, "evaluated together")):
        sizes: list[int] = []
        seen[name] = sizes

        def batch(*values: Any, make: Any = module.Batch, sizes: list[int] = sizes) -> Any:
            sizes.append(len(values[1]))
            return make(*values)

        patch.setattr(module, "Batch", batch)


def _watch_dali(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    def choose(asked: str, device: torch.device, channels: int) -> tuple[str, str]:
        return ("cpu", "by itself") if asked == "auto" else (asked, "asked for")

    def pipeline(source: Any, augmentation: Any, seed: int, **values: Any) -> Any:
        seen.update({f"DALI {name}": value for name, value in values.items() if name != "report"})
        seen["DALI crops"], seen["DALI seed"] = augmentation, seed
        raise DataError("here is no DALI")

    patch.setattr(data_build, "choose_backend", choose)
    patch.setattr(data_build, "DaliPipeline", pipeline)


def _watch_model(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    seen |= {"compiled": 0, "recomputed": 0, "ops": set()}

    def compiled(module: Any, **options: Any) -> Any:
        seen["compiled"] += 1
        return module

    def recomputed(*arguments: Any, original: Any = layers.checkpoint, **options: Any) -> Any:
        seen["recomputed"] += 1
        return original(*arguments, **options)

    def wrap(model: Any, world: Any, *, original: Any = build.wrap, **options: Any) -> Any:
        seen["synchronised"] = options["sync_batch_norm"]
        return original(model, world, **options)

    def step(state: Any, batches: Any, original: Any = graphed_steps.train_step) -> Any:
        kernels = [p for p in state.model.parameters() if p.ndim == 4]
        # those with one pixel are in both formats at once
        kernels = [p for p in kernels if p.shape[1] > 1 and p.shape[2] > 1]
        seen["weights' layout"] = [p.is_contiguous(memory_format=CHANNELS_LAST) for p in kernels]
        return original(state, batches)

    def run(op: Any, backend: str, /, *arguments: Any, original: Any = Op.__call__) -> Any:
        seen["ops"].add((op.name, backend))
        return original(op, backend, *arguments)

    patch.setattr(torch, "compile", compiled)
    patch.setattr(layers, "checkpoint", recomputed)
    patch.setattr(convnet, "checkpoint", recomputed)
    patch.setattr(build, "wrap", wrap)
    patch.setattr(graphed_steps, "train_step", step)
    patch.setattr(Op, "__call__", run)


def _watch_timm(patch: pytest.MonkeyPatch, seen: Fingerprint) -> None:
    """timm is no dependency of the tests: a transform that resizes, and a mixture that is none."""

    class Transform:
        def __init__(self, **values: Any) -> None:
            seen.update({f"timm's {name}": value for name, value in values.items()})
            self.size, self.transforms = values["input_size"], [None]

        def __call__(self, picture: Any) -> torch.Tensor:
            height, width = self.size
            pixels = np.array(picture.resize((width, height)), dtype=np.float32)
            return torch.from_numpy(pixels / 255).movedim(-1, 0)

    class Mixup:
        def __init__(self, **values: Any) -> None:
            seen.update({f"timm's {name}": value for name, value in values.items()})
            self.classes = values["num_classes"]

        def __call__(self, image: torch.Tensor, label: torch.Tensor) -> Any:
            return image, torch.nn.functional.one_hot(label, self.classes).float()

    def shift(size: tuple[int, int], padding: int) -> None:
        seen["timm's RandomCrop"] = size, padding

    timm = SimpleNamespace(create_transform=Transform, Mixup=Mixup, RandomCrop=shift)
    for module in (views, mixing):
        patch.setattr(module, "import_timm", lambda name: timm)
