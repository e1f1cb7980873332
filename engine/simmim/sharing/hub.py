"""Models as folders to share: written here, loaded from here or from the Hugging Face Hub.

Of the Hub only the files below are ever downloaded, and the weights are safetensors: nothing in
them can run code. huggingface_hub (extra `hub`) is needed for the Hub alone.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from PIL import Image

from simmim.config.sections import MaskConfig
from simmim.errors import RunError
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

# What loading takes from the Hub.
DOWNLOADED = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")

ModelT = TypeVar("ModelT", bound=ImageModel)


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
    """Write a model as a folder that `from_pretrained` reads: weights, config.json, README.md.

    Args:
        model: on any device.
        folder: made if needed.
        facts: for the card; see `simmim.sharing.run_facts.read_facts`.
        mask: unit and ratio that the model was trained with.
        picture: reconstructions for the card, or the PNG of some.
        license: the Hub's identifier of one, for the card.
        overwrite: replace those files where they exist.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is a run folder, or has such files already.
        OSError: a file cannot be written.
    """
    folder = Path(folder).expanduser()
    check_output(folder, overwrite)
    if picture is None:
        (folder / PICTURE_FILE).unlink(missing_ok=True)  # of the model that is replaced
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
    """Write the model of a checkpoint as a folder to share, with what its run tells of it.

    Args:
        path: anything that `load_model` reads; of a fine-tuning run, its best weights.
        folder: see `save_pretrained`.
        images: photos whose reconstructions the card shows; none takes the run's newest picture,
            which shows images it was trained on.
        with_picture: False leaves pictures out.
        license: see `save_pretrained`.
        overwrite: see `save_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: unreadable weights or photos, photos for a model that reconstructs nothing, or
            files that exist.
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


def from_pretrained(
    name_or_folder: str | Path,
    kind: type[ModelT],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    image_size: int | Sequence[int] | None = None,
) -> ModelT:
    """A model of a folder, or of the Hugging Face Hub, in evaluation mode on the CPU.

    Args:
        name_or_folder: a folder or weights file here, whatever `load_model` reads; else the name
            of a repository on the Hub, "user/name".
        kind: `SimMIM`, `Classifier`, or `ImageModel` for either.
        revision: branch, tag or commit on the Hub; None is its newest.
        token: for private repositories; None takes the one that `hf auth login` stored.
        cache_dir: where downloads are kept; None takes huggingface_hub's folder.
        image_size: see `load_model`.

    Raises:
        ValueError: no such folder or repository, unreadable weights, or a model of another kind.
        RunError: the Hub cannot be reached, or huggingface_hub is missing.
    """
    place = Path(name_or_folder).expanduser()
    if place.exists():
        if revision is not None:
            raise ValueError(f"{place}: is a folder here, which has no revision {revision}")
        weights = best_weights(place)
    else:
        weights = _download(str(name_or_folder), revision, token, cache_dir)
    model = load_model(weights, image_size)
    if not isinstance(model, kind):
        raise ValueError(
            f"{name_or_folder}: holds a {type(model).__name__}, no {kind.__name__}; "
            f"{type(model).__name__}.from_pretrained loads it"
        )
    return model


def _download(
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None
) -> Path:
    """The weights file of a repository, in the local cache; config.json lies beside it."""
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{name}: no such file or folder, and no name on the Hub (user/name)")
    hub = _import_hub(name)
    try:
        folder = hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(DOWNLOADED),
            library_name="simmim",
        )
    except Exception as error:
        # its own kinds, and any of the HTTP client below it
        raise _explained(error, name, revision, hub) from None
    weights = Path(folder) / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(f"{name}: has no {WEIGHTS_FILE}, and nothing else is read from the Hub")
    return weights


def push_to_hub(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a model of simmim",
) -> str:
    """Upload a folder of `save_pretrained`, those files alone; returns the address.

    Args:
        folder: written by `save_pretrained` or `simmim export`.
        name: of the repository, "user/name"; made if needed.
        private: whether a new repository is private.
        token: that may write; None takes the one that `hf auth login` stored.
        revision: branch; None is the main one.
        message: of the commit.

    Raises:
        ValueError: the folder holds no exported model, or the name is none.
        RunError: the Hub cannot be reached or refuses, or huggingface_hub is missing.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in DOWNLOADED if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: has no {missing[0]}; `simmim export` makes such a folder")
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{name}: no name on the Hub; choose user/name")
    hub = _import_hub(name)
    try:
        api = hub.HfApi(token=token, library_name="simmim")
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=list(FILES),
        )
    except Exception as error:
        # its own kinds, and any of the HTTP client below it
        raise _explained(error, name, revision, hub) from None
    return str(address)


def _import_hub(name: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise RunError(
            f"{name}: no such folder here, and the Hub needs huggingface_hub: "
            "pip install 'simmim[hub]'"
        ) from None
    return huggingface_hub


def _explained(
    error: Exception, name: str, revision: str | None, hub: ModuleType
) -> ValueError | RunError:
    """One line on why the Hub did not give or take something."""
    kinds: Any = hub.errors
    if isinstance(error, kinds.RevisionNotFoundError):
        return ValueError(f"{name}: has no revision {revision} on the Hub")
    if isinstance(error, kinds.GatedRepoError):
        return ValueError(f"{name}: its owner asks you to accept terms on the Hub first")
    if isinstance(error, kinds.RepositoryNotFoundError):
        return ValueError(
            f"{name}: no such folder here and no such model on the Hub, or a private one: "
            "`hf auth login` first"
        )
    if isinstance(error, kinds.HFValidationError):
        return ValueError(f"{name}: no such folder here, and no name on the Hub (user/name)")
    if isinstance(error, kinds.LocalEntryNotFoundError | kinds.OfflineModeIsEnabled):
        return RunError(
            f"{name}: no such folder here, not downloaded before, and the Hub cannot be reached "
            "(or HF_HUB_OFFLINE is set)"
        )
    lines = str(error).strip().splitlines()
    return RunError(f"{name}: the Hub: {lines[0] if lines else type(error).__name__}")
