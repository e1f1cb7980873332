"""The `simmim` command: which words it knows, and what they run."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from simmim.environment import Launch
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


# Commands that are a file of simmim/commands.
IN_FILES = (
    "evaluate",
    "predict",
    "probe",
    "knn",
    "features",
    "convert",
    "export",
    "pack",
    "models",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (0 done, 1 failed, 2 wrong usage, 75 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "pretrain": _pretrain,
        "finetune": _finetune,
        "reconstruct": _reconstruct,
        "doctor": _doctor,
        "recipes": _recipes,
        # heavy parts are imported when a command runs
        **{name: _in_file(name) for name in IN_FILES},
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"simmim {__version__}")
        return 0
    if arguments[0] not in commands:
        return _fail(f"unknown command {arguments[0]}; known are {', '.join(commands)}", 2)
    try:
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1


def _fail(message: str, code: int) -> int:
    rank = Launch.of_environment().rank
    where = f" (process {rank})" if rank else ""
    print(f"simmim: error{where}: {message}", file=sys.stderr)
    return code


def _in_file(name: str) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        code: int = import_module(f"simmim.commands.{name}").main(arguments)
        return code

    return run


def _pretrain(arguments: list[str]) -> int:
    from simmim.command_line import load
    from simmim.errors import ConfigError

    try:
        config = load(arguments)
    except ConfigError as error:
        return _refuse(error)
    from simmim.pretrain import pretrain

    return _train(lambda: pretrain(config), config.output)


def _finetune(arguments: list[str]) -> int:
    from simmim.command_line import load_finetuning
    from simmim.errors import ConfigError

    try:
        config = load_finetuning(arguments)
    except ConfigError as error:
        return _refuse(error)
    from simmim.downstream.finetune import finetune

    return _train(lambda: finetune(config), config.output)


def _refuse(error: Exception) -> int:
    # every process finds the same fault; one of them says it
    return _fail(str(error), 2) if Launch.of_environment().rank == 0 else 2


def _train(run: Callable[[], int], output: str) -> int:
    from simmim.errors import ConfigError, RunError

    try:
        return run()
    except ConfigError as error:
        return _refuse(error)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        where = error.filename or output
        return _fail(f"{where}: {error.strerror or error}; the same command resumes the run", 1)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            return _fail(
                f"out of memory ({str(error).splitlines()[0]}); try a larger "
                "--train.accumulation_steps, or --train.activation_checkpointing=true",
                1,
            )
        raise


def _is_out_of_memory(error: RuntimeError) -> bool:
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


def _reconstruct(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="simmim reconstruct",
        description="Draw original | masked | reconstruction of photos.",
    )
    add = parser.add_argument
    add("checkpoint", help="weights file, checkpoint folder or run folder")
    add("images", nargs="+", type=Path, metavar="IMAGE", help="photos")
    add(
        "--output",
        type=Path,
        default=Path("reconstruction.png"),
        help="PNG to write (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    add("--mask-unit", type=int, help="side of a mask unit, pixels (default: as trained, or 32)")
    add("--mask-ratio", type=float, help="share of units hidden (default: as trained, or 0.6)")
    add("--seed", type=int, default=0, help="seed of the masks (default: %(default)s)")
    add("--image-size", type=int, help="side in pixels (default: the checkpoint's)")
    add(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 255 where files hold other than 8 bits",
    )
    options = parser.parse_args(arguments)
    if options.output.exists() and not options.overwrite:
        return _fail(f"{options.output} exists; choose another --output or add --overwrite", 2)
    from simmim.model.image_model import MaskedImageModel
    from simmim.model.weights_file import trained_mask
    from simmim.pictures.grid import save_picture
    from simmim.pictures.reconstruction import reconstruct_files
    from simmim.weights.load import load_model

    try:
        model = load_model(options.checkpoint, options.image_size)
        if not isinstance(model, MaskedImageModel):
            raise ValueError(
                f"{options.checkpoint}: a {model.kind} reconstructs nothing; give the pre-trained "
                "run of a method that masks images"
            )
        trained = trained_mask(options.checkpoint)
        picture = reconstruct_files(
            model,
            options.images,
            mask_unit=options.mask_unit or trained["unit"],
            ratio=trained["ratio"] if options.mask_ratio is None else options.mask_ratio,
            seed=options.seed,
            value_range=options.value_range and tuple(options.value_range),
        )
        save_picture(picture, options.output)
    except ValueError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or options.output}: {error.strerror}", 1)
    print(options.output)
    return 0


def _doctor(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog="simmim doctor",
        description="Versions, devices, and the backend each op would use and why not another.",
    ).parse_args(arguments)
    from simmim.commands.doctor import report

    print(report())
    return 0


def _recipes(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog="simmim recipes", description="The shipped configurations, by name."
    ).parse_args(arguments)
    from simmim.command_line import recipe_folders

    for folder in recipe_folders()[:1]:
        for path in sorted(folder.glob("*.toml")):
            first = path.read_text(encoding="utf-8").splitlines()[0]
            print(f"{path.stem:<30} {first.lstrip('# ')}")
    return 0
