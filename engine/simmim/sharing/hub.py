"""Models of the Hugging Face Hub, and to it: loaded by name as folders here are, and uploaded.

Of the Hub only the files below are ever downloaded, and the weights are safetensors: nothing in
them can run code. huggingface_hub (extra `hub`) is needed for the Hub alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Unpack

from simmim.errors import RunError
from simmim.model.image_model import ImageModel
from simmim.run_folder import WEIGHTS_FILE
from simmim.sharing.card import CARD_FILE
from simmim.sharing.model_folder import CONFIG_FILE, FILES
from simmim.weights import load
from simmim.weights.load import ArchitectureHints

# The files that loading takes from the Hub.
DOWNLOADED = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    norm_target: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    **given: Unpack[ArchitectureHints],
) -> ImageModel:
    """The model of a checkpoint here or on the Hugging Face Hub, in evaluation mode on the CPU.

    The names in a file tell its layout: ours, that of microsoft/SimMIM, timm, torchvision, Hugging
    Face (a folder with config.json) or mmpretrain. The architecture is taken from the metadata or
    the configuration of the file, else from names and shapes.

    Args:
        path_or_state_dict: a weights file, a checkpoint folder, a run folder (its newest
            checkpoint), a folder of `save_pretrained`, or a state dict. A string that names no
            file or folder here is the name of a repository on the Hub, "user/name".
        image_size: side, or (height, width), in pixels; None takes what the checkpoint tells.
        norm_target: window of the target normalisation, which only the loss uses.
        revision: branch, tag or commit on the Hub; None is the newest.
        token: for private repositories; None takes the one that `hf auth login` stored.
        cache_dir: where downloads are kept; None takes huggingface_hub's folder.
        given: see `simmim.weights.load.ArchitectureHints`.

    Returns:
        A `SimMIM` (`encode`, `reconstruct`, and the loss when called), a `Classifier` (`encode`,
        and logits when called) where there is a class head, or the model of another method.

    Raises:
        ValueError: no such file, folder or repository, or the file is unreadable, unsafe, of an
            unknown layout, holds values that are not finite, has neither decoder nor head, or does
            not fit `image_size`; names it.
        RunError: the Hub cannot be reached, or huggingface_hub is missing.
    """
    checkpoint = _find(path_or_state_dict, revision, token, cache_dir)
    return load.load_model(checkpoint, image_size, norm_target=norm_target, **given)


def load_encoder(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    **given: Unpack[ArchitectureHints],
) -> ImageModel:
    """The encoder alone of a checkpoint here or on the Hub, with the arguments of `load_model`.

    Raises:
        ValueError: as of `load_model`, but not for a missing decoder or head.
        RunError: see `load_model`.
    """
    checkpoint = _find(path_or_state_dict, revision, token, cache_dir)
    return load.load_encoder(checkpoint, image_size, **given)


def _find(
    path_or_state_dict: str | Path | Mapping[str, Any],
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
) -> Path | Mapping[str, Any]:
    """The checkpoint itself if it is here; else the downloaded weights file of a repository."""
    if isinstance(path_or_state_dict, Mapping):
        checkpoint: Path | Mapping[str, Any] = path_or_state_dict
        described = "state dict"
    else:
        checkpoint = Path(path_or_state_dict).expanduser()
        described = str(checkpoint)
        # a name is a string, and does not end as files of weights do
        can_be_name = isinstance(path_or_state_dict, str) and not described.endswith(_SUFFIXES)
        if can_be_name and not checkpoint.exists():
            return _download(str(path_or_state_dict), revision, token, cache_dir)
    if revision is not None:
        raise ValueError(f"{described}: is not on the Hub, and has no revision {revision}")
    return checkpoint


def _download(
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None
) -> Path:
    """The weights file of a repository, in the local cache with config.json beside it."""
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
        # errors of huggingface_hub, and of any kind from its HTTP client
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
    """Upload the files that `save_pretrained` wrote to a folder, and no others.

    Args:
        folder: written by `save_pretrained` or `simmim export`.
        name: name of the repository, "user/name", which is made if needed.
        private: whether a new repository is private.
        token: one that may write; None takes the one that `hf auth login` stored.
        revision: branch; None is the main one.
        message: message of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the folder holds no exported model, or the name cannot be one of the Hub.
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
        # errors of huggingface_hub, and of any kind from its HTTP client
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
    """An error that says in one line why a download or an upload failed."""
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
