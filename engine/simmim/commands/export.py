"""The `simmim export` command: a model as a folder to share."""

import argparse
from pathlib import Path

from simmim.commands.errors import one_line_errors
from simmim.sharing.card import NO_LICENSE
from simmim.sharing.model_folder import FILES, export

DESCRIPTION = "Weights, config.json and a model card with a picture, ready to share."

EPILOGUE = """\
The card tells the recipe, the data by name and number, the length and the results of the run; no
folders of this machine. simmim.load_model loads FOLDER, and simmim.push_to_hub uploads it.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim export`."""
    made = argparse.ArgumentParser(
        prog="simmim export",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "run",
        metavar="RUN",
        help="run folder (of a fine-tuning run: its best weights), checkpoint or weights file",
    )
    add("folder", type=Path, metavar="FOLDER", help="folder to write to")
    add(
        "--images",
        nargs="+",
        type=Path,
        default=[],
        metavar="PHOTO",
        help="reconstruct these for the card (default: the run's newest picture)",
    )
    add("--no-picture", action="store_true", help="show no images, which the run's picture does")
    add(
        "--license",
        default=NO_LICENSE,
        metavar="ID",
        help="as the Hub calls it, such as mit or apache-2.0 (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a model that is in FOLDER")
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 the machine, 2 wrong input)."""
    reader = parser()
    given = reader.parse_args(arguments)
    if given.images and given.no_picture:
        reader.error("--images draws a picture: leave out --no-picture")
    if not given.license.replace("-", "").replace(".", "").isalnum():
        reader.error(f"--license {given.license}: give an identifier of the Hub's, such as mit")
    model = export(
        given.run,
        given.folder,
        images=given.images,
        with_picture=not given.no_picture,
        license=given.license,
        overwrite=given.overwrite,
    )
    written = [name for name in FILES if (given.folder.expanduser() / name).exists()]
    print(f"{given.folder}: {type(model).__name__}; {', '.join(written)}")
    return 0
