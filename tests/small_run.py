"""Training states, batches and recipes small enough for tests: every method and backbone."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simmim.backbone import build
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.command_line import load
from simmim.data.batch import Batch
from simmim.distributed import World
from simmim.pretrain import build_state
from simmim.training.step import TrainState

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"

# A recipe can set depths, but not a ConvNet's widths, and its smallest preset takes minutes.
NARROW = {
    "resnet_narrow": ResNetSpec(depths=(1, 1, 1, 1), bottleneck=False, width=8),
    "convnext_narrow": ConvNeXtSpec(depths=(1, 1, 1, 1), widths=(8, 16, 24, 32)),
}

SWINV2 = {
    "name": '"swinv2_tiny"', "patch_size": "4", "embed_dim": "16", "depths": "[1, 2]",
    "num_heads": "[2, 4]", "window_size": "4",
}  # fmt: skip
VIT = {
    "name": '"vit_tiny"', "patch_size": "8", "embed_dim": "32", "depths": "[2]",
    "num_heads": "[2]",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method on a backbone.

    Attributes:
        recipe: a shipped recipe that takes seconds.
        model: replaces the recipe's [model] table; {} keeps it.
        batch_norms: whether an image's features depend on the others of its micro-batch.
        views: how many views of an image the method takes.
    """

    recipe: str
    model: dict[str, str]
    batch_norms: bool = False
    views: int = 1

    def write(self, folder: Path) -> Path:
        """The recipe as a TOML file in `folder`."""
        tables = (CONFIGS / f"{self.recipe}.toml").read_text().split("\n[")
        if self.model:
            lines = [f"{key} = {value}" for key, value in self.model.items()]
            own = "\n".join(["model]", *lines, ""])
            tables = [own if table.startswith("model]") else table for table in tables]
        path = folder / f"{self.recipe}.toml"
        path.write_text("\n[".join(tables))
        return path


CASES = {
    "simmim-swin": Case("smoke", {}),
    "simmim-swinv2": Case("smoke", SWINV2),
    "simmim-vit": Case("smoke", VIT),
    "simmim-resnet": Case("smoke", {"name": '"resnet_narrow"'}, batch_norms=True),
    "simmim-convnext": Case("smoke", {"name": '"convnext_narrow"'}),
    "tokens-vit": Case("tokens_smoke", {}),
    "simsiam-swin": Case("simsiam_smoke", {}, batch_norms=True, views=2),
    "simsiam-resnet": Case("simsiam_smoke", {"name": '"resnet_narrow"'}, batch_norms=True, views=2),
}


def add_narrow_presets(patch: pytest.MonkeyPatch) -> None:
    """Make the names of NARROW known."""
    for name, spec in NARROW.items():
        patch.setitem(build.PRESETS, name, spec)


def make_state(*flags: str, recipe: str | Path = "smoke") -> TrainState:
    config = load([str(recipe), "--data.path=x", "--schedule.warmup_steps=1", *flags])
    return build_state(config, 100, World(0, 1, CPU))


def make_batch(first: int, size: int, step: int = 0, views: int = 1) -> Batch:
    ids = torch.arange(first, first + size)
    generator = torch.Generator().manual_seed(1000 * step)
    shape = (64, 64, 64, 3) if views == 1 else (64, views, 64, 64, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(pixels[first : first + size], ids, torch.full((size,), step), size)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.model.state_dict().items()}
