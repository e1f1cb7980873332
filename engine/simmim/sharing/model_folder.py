"""Writes a model as a folder to share: weights, config.json, a card and its picture."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from simmim.config.sections import MaskConfig
from simmim.files import write_atomic, write_text
from simmim.model.image_model import ImageModel, MaskedImageModel
from simmim.model.weights_file import best_weights, find_weights, save_weights, trained_mask
from simmim.pictures.grid import save_picture
from simmim.pictures.reconstruction import reconstruct_files
from simmim.run_folder import WEIGHTS_FILE, RunFolder
from simmim.sharing.card import CARD_FILE, NO_LICENSE, PICTURE_FILE, describe, write_card
from simmim.sharing.run_facts import RunFacts, read_facts
from simmim.weights.load import load_model

CONFIG_FILE = "config.json"

FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, PICTURE_FILE)


def save_pretrained(
    model: ImageModel,
    folder: str | Path,
    *,
    facts: RunFacts | None = None,
    mask: Mapping[str, Any] | None = None,
    picture: Image.Image | Path | None = None,
    license: str = NO_LICENSE,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder that `load_model` reads: weights, config.json, README.md.

    Args:
        model: on any device.
        folder: folder to write, which is made if needed.
        facts: facts for the card; see `simmim.sharing.run_facts.read_facts`.
        mask: unit and ratio of the mask that the model was trained with.
        picture: reconstructions for the card, as an image or as the path of a PNG.
        license: the Hub's identifier of a license, for the card.
        overwrite: whether to replace these files if they exist.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is a run folder, or has these files already.
        OSError: a file cannot be written.
    """
    folder = Path(folder).expanduser()
    check_output(folder, overwrite)
    if picture is None:
        (folder / PICTURE_FILE).unlink(missing_ok=True)  # that of the replaced model
    elif isinstance(picture, Path):
        source = picture
        write_atomic(folder / PICTURE_FILE, lambda temporary: shutil.copyfile(source, temporary))
    else:
        save_picture(picture, folder / PICTURE_FILE)
    kept = None if mask is None else MaskConfig(unit=mask["unit"], ratio=mask["ratio"])
    write_atomic(folder / WEIGHTS_FILE, lambda temporary: save_weights(model, temporary, kept))
    text = json.dumps(describe(model, mask), indent=1, ensure_ascii=False)
    write_text(folder / CONFIG_FILE, text + "\n")
    write_card(folder, model, facts, mask=mask, picture=picture is not None, license=license)
    return folder


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise ValueError where `save_pretrained` would replace something that it must not."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another folder")
    if RunFolder(folder).starts.exists():
        raise ValueError(f"{folder}: is the folder of a run; choose another folder")
    existing = [folder / name for name in FILES if (folder / name).exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists; choose another folder or overwrite it")


def export(
    path: str | Path,
    folder: str | Path,
    *,
    images: Sequence[Path] = (),
    with_picture: bool = True,
    license: str = NO_LICENSE,
    overwrite: bool = False,
) -> ImageModel:
    """Write the model of a checkpoint as a folder to share, with the facts of its run.

    Args:
        path: anything that `load_model` reads; a fine-tuning run means its best weights.
        folder: see `save_pretrained`.
        images: photos whose reconstructions the card shows. Without any, it shows the run's newest
            picture, which is of training images.
        with_picture: whether the card may show a picture.
        license: see `save_pretrained`.
        overwrite: see `save_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: weights or photos cannot be read, photos were given for a model that
            reconstructs nothing, or files exist already.
        OSError: a file cannot be written.
    """
    folder = Path(folder).expanduser()
    check_output(folder, overwrite)
    weights = find_weights(best_weights(path))
    model, facts = load_model(weights), read_facts(weights)
    mask = trained_mask(weights) if isinstance(model, MaskedImageModel) else None
    picture: Image.Image | Path | None = None
    if images:
        if not isinstance(model, MaskedImageModel) or mask is None:
            raise ValueError(f"{path}: a {model.kind} reconstructs nothing; leave out the photos")
        picture = reconstruct_files(
            model, list(images), mask_unit=mask["unit"], ratio=mask["ratio"], seed=0
        )
    elif with_picture and facts is not None and isinstance(model, MaskedImageModel):
        picture = facts.picture
    save_pretrained(
        model,
        folder,
        facts=facts,
        mask=mask,
        picture=picture,
        license=license,
        overwrite=overwrite,
    )
    return model
