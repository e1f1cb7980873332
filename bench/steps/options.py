"""The command line of bench/throughput.py, and the run that it describes."""

import argparse
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bench.peers.by_method import PACKAGES, PEERS
from bench.steps.build import REFERENCE, names_of
from simmim.backbone.build import PRESETS
from simmim.config.sections import (
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from simmim.config.values import config_class, nearest
from simmim.errors import ConfigError
from simmim.method.build import check_config, method_class

# What --model takes besides presets: preset, method, and ratio of hidden tokens.
RECIPES = {"vit_small_tokens": ("vit_small_plain", "tokens", 0.75)}


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options that are checked; a wrong one ends the program with one line and exit code 2.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        The options, with every default filled in, and `config`: the run that is timed.
    """
    parser = OneLineParser(
        prog="throughput.py",
        description="Images per second and memory of one step, here and in other packages.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    add("--model", default="swin_base", help=f"one of {', '.join([*RECIPES, *PRESETS])}")
    add("--method", choices=tuple(PEERS), help="default: simmim, or the method of the recipe")
    add("--batch", type=int, nargs="+", help="images per step; default: 8 on cpu, 128 on cuda")
    add("--dtype", choices=("bf16", "float32"), default="bf16")
    add("--image-size", type=int, help="side of an image in pixels; default: that of the preset")
    add("--compile", action="store_true", help="add rows that go through torch.compile")
    add("--only", help=f"rows, separated by commas: simmim, reference, {', '.join(PACKAGES)}")
    add("--rounds", type=int, default=5, help="smallest number of timed steps of every row")
    add("--seconds", type=float, default=10.0, help="shortest time to spend on timing")
    add("--json", type=Path, help="file to write all numbers to")
    add("--plot", type=Path, help="PNG file for throughput and memory against the batch size")
    options = parser.parse_args(arguments)
    _set_method(parser, options)
    _set_device_and_batch(parser, options)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if not 0 <= options.seconds < 1e6:
        parser.error(f"--seconds {options.seconds}: between 0 and a million")
    _set_rows(parser, options)
    _check_outputs(parser, options)
    try:
        options.config = make_config(options)
        check_config(options.config)
    except ConfigError as problem:
        parser.error(str(problem))
    return options


def _set_method(parser: OneLineParser, options: argparse.Namespace) -> None:
    if options.model not in {*PRESETS, *RECIPES}:
        near = nearest(options.model, [*PRESETS, *RECIPES])
        parser.error(f"--model {options.model} is unknown; {near}")
    default = RECIPES[options.model][1] if options.model in RECIPES else "simmim"
    if options.model in RECIPES and options.method not in (None, default):
        parser.error(f"--model {options.model} goes with --method {default}, not {options.method}")
    options.method = options.method or default


def _set_device_and_batch(parser: OneLineParser, options: argparse.Namespace) -> None:
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    options.batch = options.batch or [128 if options.device == "cuda" else 8]
    if min(options.batch) < 1:
        parser.error(f"--batch {min(options.batch)}: at least 1 image")
    if len(set(options.batch)) < len(options.batch):
        parser.error(f"--batch {' '.join(map(str, options.batch))}: the same size twice")


def _set_rows(parser: OneLineParser, options: argparse.Namespace) -> None:
    names = names_of(options.method)
    options.only = [n.strip() for n in options.only.split(",")] if options.only else names
    # the printed name of the row is allowed as well
    options.only = ["reference" if name == REFERENCE else name for name in options.only]
    for name in options.only:
        if name not in names:
            parser.error(f"--only {name} is no row; {nearest(name, names)}")


def _check_outputs(parser: OneLineParser, options: argparse.Namespace) -> None:
    for path in filter(None, (options.json, options.plot)):
        try:  # before the run, which may take an hour
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as problem:
            parser.error(f"{path} cannot be written: {problem.strerror}")
        if path.is_dir():
            parser.error(f"{path} is a folder")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")


def make_config(options: argparse.Namespace) -> Config:
    """The run whose step is timed: the published recipe with a small, constant learning rate."""
    model, _, ratio = RECIPES.get(options.model, (options.model, "", MaskConfig().ratio))
    settings = method_class(options.method).Settings
    return config_class(settings)(
        device=options.device,
        model=ModelConfig(name=model),
        method=settings(name=options.method),
        mask=MaskConfig(ratio=ratio),
        data=DataConfig(
            path="random images", image_size=options.image_size or PRESETS[model].image_size
        ),
        # the smallest batch, because a method may need at least so many images
        train=TrainConfig(batch_size=min(options.batch), precision=options.dtype),
        # small, because random images teach nothing and the loss should stay finite
        optim=OptimConfig(lr=1e-5, lr_batch=0),
        schedule=ScheduleConfig(name="constant", warmup_epochs=0),
    )
