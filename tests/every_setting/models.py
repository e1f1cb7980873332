"""One step of a model that a configuration describes, and its fingerprint."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from every_setting import recipes
from every_setting.case import EXIT_CODE
from every_setting.fingerprint import digests, shapes
from every_setting.runs import Made, Pairs, make_parser_once
from simmim import command_line
from simmim.backbone.build import SPEC_TYPES
from simmim.config.sections import ModelConfig
from simmim.config.values import leaves
from simmim.data.batch import Batch
from simmim.distributed import World
from simmim.errors import ConfigError
from simmim.pretrain import build_state
from simmim.training.step import train_step
from small_run import add_narrow_presets

MODELS: Mapping[str, str] = {
    "swin": 'name = "swin_tiny"\npatch_size = 4\nembed_dim = 16\ndepths = [1, 2]\n'
    "num_heads = [2, 4]\nwindow_size = 4\n",
    "swinv2": 'name = "swinv2_tiny"\npatch_size = 4\nembed_dim = 16\ndepths = [1, 2]\n'
    "num_heads = [2, 4]\nwindow_size = 4\n",
    "vit": 'name = "vit_tiny"\npatch_size = 8\nembed_dim = 32\ndepths = [2]\nnum_heads = [2]\n',
    "resnet": 'name = "resnet_narrow"\n',
    "convnext": 'name = "convnext_narrow"\n',
}
"""Table [model] of every family of backbones."""

# What a family with one stage has a number for.
_OF_ONE_STAGE = {"depths": "depth"}


def keys_of(family: str) -> set[str]:
    """The keys of [model] that an architecture has; any other is refused."""
    own = {field.name for field in fields(SPEC_TYPES[family])} | {"name"}
    keys = {field.name for field in fields(ModelConfig)}
    return {f"model.{key}" for key in keys if key in own or _OF_ONE_STAGE.get(key) in own}


class Models(Pairs):
    """Makes a step of the pre-training of a family's models.

    Args:
        family: of `MODELS`.
        folder: for the recipe.
    """

    def __init__(self, family: str, folder: Path) -> None:
        super().__init__()
        own = f"[model]\n{MODELS[family]}\n"
        text = recipes.SIMMIM.replace(recipes.SWIN, own).replace(
            "image_size = 32", "image_size = 64"
        )
        self.recipe = folder / f"{family}.toml"
        self.recipe.write_text(text.replace("unit = 8", "unit = 16").replace("$images", "nowhere"))

    def make(self, settings: Sequence[str]) -> Made:
        """See `Pairs`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_line, "make_parser", make_parser_once)
            add_narrow_presets(patch)
            try:
                config = command_line.load([str(self.recipe), *(f"--{s}" for s in settings)])
            except ConfigError as error:
                return Made({EXIT_CODE: 2, "error": str(error)}, {})
            state = build_state(config, 12, World(0, 1, torch.device("cpu")))
        begun = digests(dict(state.model.state_dict()))
        pixels = torch.randint(0, 256, (4, 64, 64, 3), generator=torch.Generator().manual_seed(0))
        batch = Batch(pixels.to(torch.uint8), torch.arange(4), torch.zeros(4, dtype=torch.int64), 4)
        metrics = train_step(state, [batch])
        found = {
            EXIT_CODE: 0,
            "shapes": shapes(dict(state.model.state_dict())),
            "parameters": shapes(dict(state.model.named_parameters())),
            "trainable": [n for n, p in state.model.named_parameters() if p.requires_grad],
            "first weights": begun,
            "losses": float(metrics.loss),
            "gradients": float(metrics.grad_norm),
        }
        return Made(found, leaves(config))
