"""The `simmim reconstruct` command."""

import argparse
from pathlib import Path

from simmim.commands.arguments import add_value_range, positive
from simmim.commands.errors import one_line_errors
from simmim.model.image_model import MaskedImageModel
from simmim.model.weights_file import trained_mask
from simmim.pictures.grid import save_picture
from simmim.pictures.reconstruction import reconstruct_files
from simmim.weights.load import load_model


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim reconstruct`."""
    made = argparse.ArgumentParser(
        prog="simmim reconstruct",
        description="Draw original | masked | reconstruction of photos.",
    )
    add = made.add_argument
    add("checkpoint", help="weights file, checkpoint folder or run folder")
    add("images", nargs="+", type=Path, metavar="IMAGE", help="photos")
    add(
        "--output",
        type=Path,
        default=Path("reconstruction.png"),
        help="PNG to write (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    add(
        "--mask-unit",
        type=positive,
        help="side of a mask unit, pixels (default: as trained, or 32)",
    )
    add("--mask-ratio", type=float, help="share of units hidden (default: as trained, or 0.6)")
    add("--seed", type=int, default=0, help="seed of the masks (default: %(default)s)")
    add("--image-size", type=positive, help="side in pixels (default: the checkpoint's)")
    add_value_range(made)
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 the machine, 2 wrong input)."""
    given = parser().parse_args(arguments)
    if given.output.exists() and not given.overwrite:
        raise ValueError(f"{given.output} exists; choose another --output or add --overwrite")
    model = load_model(given.checkpoint, given.image_size)
    if not isinstance(model, MaskedImageModel):
        raise ValueError(
            f"{given.checkpoint}: a {model.kind} reconstructs nothing; give the pre-trained "
            "run of a method that masks images"
        )
    trained = trained_mask(given.checkpoint)
    picture = reconstruct_files(
        model,
        given.images,
        mask_unit=given.mask_unit or trained["unit"],
        ratio=trained["ratio"] if given.mask_ratio is None else given.mask_ratio,
        seed=given.seed,
        value_range=given.value_range,
    )
    save_picture(picture, given.output)
    print(given.output)
    return 0
