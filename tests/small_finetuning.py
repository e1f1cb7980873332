"""Fine-tuning runs that are started with small images, and make no step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simmim.command_line import load_finetuning
from simmim.config.finetune import FinetuneConfig
from simmim.data.loader import Loader
from simmim.downstream import finetune as finetuning
from simmim.downstream.finetune import Evaluations, finetune
from simmim.run_folder import RunFolder
from simmim.training.step import TrainState

VIT = (
    "--model.name=vit_tiny", "--model.embed_dim=8", "--model.num_heads=[1]", "--model.depths=[2]",
    "--model.patch_size=8",
)  # fmt: skip
OF_WEIGHTS = ("--pretrained=x",)


def write_classes(folder: Path, per_class: int, classes: str = "ab") -> Path:
    """Class folders of grey images; an image's brightness tells its class and number."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            value = 20 * number + 10 * place
            Image.new("RGB", (20, 20), (value, value, value)).save(folder / name / f"{number}.png")
    return folder


def configure(*flags: str, model: tuple[str, ...] = VIT) -> FinetuneConfig:
    """Of images of 16 pixels, with a small ViT unless the weights tell the architecture."""
    here = ("--data.path=x", "--output=x", "--data.image_size=16", "--data.workers=0")
    return load_finetuning(["finetune_smoke", *here, *model, *flags])


@dataclass
class Started:
    """What a run handed to the loop, and what the loop makes of it."""

    state: TrainState
    source: Any
    loader: Loader
    observer: Evaluations
    folder: RunFolder
    log: Any


class Start:
    """Starts runs with flags; the loop takes what it is given, and makes no step.

    Args:
        images: labelled images.
        output: the runs' folder.
        patch: puts the stand-in for the loop in its place.
    """

    def __init__(self, images: Path, output: Path, patch: pytest.MonkeyPatch) -> None:
        self._places = f"--data.path={images}", f"--output={output}"
        self._given: list[Started] = []
        patch.setattr(finetuning, "train", self._loop)

    def __call__(self, *flags: str, model: tuple[str, ...] = VIT) -> Started:
        """Start a run with `flags` that complete or replace those of `configure`."""
        assert finetune(configure(*self._places, *flags, model=model)) == 75
        return self._given.pop()

    def _loop(
        self, state: Any, source: Any, loader: Any, begin: Any, folder: Any, log: Any, _: Any
    ) -> int:
        made = loader()
        self._given.append(Started(state, source, made, begin(made), folder, log))
        return 75
