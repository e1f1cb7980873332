"""The `simmim` command: which words it knows, and what they run."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from simmim.commands.errors import FAILED, WRONG_INPUT, end, fail
from simmim.version import __version__

USAGE = """\
usage: simmim COMMAND …

commands:
  pretrain CONFIG [--section.key=value …]   pre-train an encoder on a folder of images
  reconstruct CHECKPOINT IMAGE…             draw original | masked | reconstruction of photos
  finetune CONFIG [--section.key=value …]   fine-tune a pre-trained encoder on labelled images
  evaluate CHECKPOINT SOURCE                accuracy of a fine-tuned model, by class
  predict CHECKPOINT IMAGE…                 classes of photos
  probe CHECKPOINT --train SOURCE           linear probe of every layer: which is best
  knn CHECKPOINT --train SOURCE             nearest neighbours in feature space
  features CHECKPOINT SOURCE OUT            features of every image, to safetensors, npy or parquet
  convert IN OUT --to LAYOUT                to and from official, timm, Hugging Face, mmpretrain
  export RUN FOLDER                         weights with a model card, ready to share
  pack SOURCE DEST                          make images into shards that train fast
  doctor                                    versions, devices, and the backend each op would use
  recipes                                   the shipped configurations
  models [NAME…]                            every backbone × method: parameters, MACs, layouts

`simmim COMMAND --help` tells more.
Several devices: torchrun --nproc-per-node N -m simmim pretrain (or finetune) …
"""


# Each is a file of simmim/commands, whose heavy parts are imported when it runs.
COMMANDS = (
    "pretrain",
    "reconstruct",
    "finetune",
    "evaluate",
    "predict",
    "probe",
    "knn",
    "features",
    "convert",
    "export",
    "pack",
    "doctor",
    "recipes",
    "models",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed, 2 wrong input, 75 or 130 stopped."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if code:  # told already
            _drop_output()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()
        return FAILED
    except OSError as error:
        _drop_output()
        return end(error, place="standard output")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"simmim {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        return fail(f"unknown command {arguments[0]}; known are {known}", WRONG_INPUT)
    code: int = import_module(f"simmim.commands.{arguments[0]}").main(arguments[1:])
    return code


def _drop_output() -> None:
    """Let go of what cannot be written: the interpreter would fail at it once more as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
