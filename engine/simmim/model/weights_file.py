"""Reads weights files of any program without running code in them, and writes safetensors."""

import json
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simmim.backbone.build import Spec, spec_to_dict
from simmim.config.sections import MaskConfig
from simmim.model.image_model import ImageModel, MaskedImageModel
from simmim.run_folder import STATE_FILE, WEIGHTS_FILE, RunFolder

METADATA_KEY = "simmim"

# Files of Hugging Face's folders: weights before safetensors, and the list of several files.
PICKLED_FILE = "pytorch_model.bin"
INDEX_FILE = "model.safetensors.index.json"


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions that new files have.

    Raises:
        OSError: it cannot be written.
        SafetensorError: the same, raised by safetensors.
    """
    save_file(dict(tensors), path, metadata=metadata)
    # safetensors makes files that only their owner can read, but others may want the encoder
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a weights file; nothing in it is executed.

    Args:
        path: a .safetensors file, a file of torch.save (read with weights_only; a yacs
            configuration inside is read as plain values), a checkpoint folder, a run folder (its
            newest checkpoint), or a folder of Hugging Face (with one weights file or several).

    Returns:
        Names and CPU tensors, taken out of "model" or "state_dict" if the file nests them; and our
        metadata, {} for files of other programs.

    Raises:
        ValueError: there is no such file, it is no weights file, or reading it would run code;
            names the path.
    """
    file = find_weights(Path(path))
    if file.name == INDEX_FILE:
        return _read_parts(file), {}
    return _read_file(file)


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = (reader.metadata() or {}).get(METADATA_KEY)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        if file.suffix == ".safetensors":
            raise ValueError(f"{file}: not a readable safetensors file ({_line(error)})") from None
    else:
        try:
            return unwrap(tensors), plain_metadata(metadata)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    # the configuration in an official checkpoint is read as a plain dictionary: no yacs, no code
    plain: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]
    try:
        with torch.serialization.safe_globals(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the pickle protocol
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL " in str(error) or "Unsupported class" in str(error):
            function = str(error).split("GLOBAL ")[-1].split(" ")[0]
            raise ValueError(
                f"{file}: refused, loading it would run code ({function}); only tensors and plain "
                "values are read. If you trust its source, re-save it as safetensors"
            ) from None
        raise ValueError(f"{file}: refused, not a plain weights file") from None
    except Exception as error:
        # damaged or hostile bytes make the restricted unpickler fail in nearly any way
        raise ValueError(f"{file}: not a readable weights file ({_line(error)})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict")
    try:
        return unwrap(content), {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_parts(index: Path) -> dict[str, Tensor]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({index.parent / str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not a readable list of weights files") from None
    state: dict[str, Tensor] = {}
    for file in files:
        if file.parent != index.parent:
            raise ValueError(f"{index}: names {file}, outside of its folder")
        if not file.is_file():
            raise ValueError(f"{file}: missing, {index.name} names it")
        state |= _read_file(file)[0]
    return state


def plain_metadata(text: str | None) -> dict[str, Any]:
    """Our metadata, read from its JSON; {} for that of another program."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}  # of another program; names and shapes still tell the architecture
    return values if isinstance(values, dict) and isinstance(values.get("encoder"), dict) else {}


def read_notes(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; {} for any other file."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as reader:
            return dict(reader.metadata() or {})
    except (OSError, SafetensorError, RuntimeError, ValueError):
        return {}


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside the wrappers that training programs save (`model`, `state_dict`)."""
    for key in ("model", "state_dict"):
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
    state = {
        name.removeprefix("module."): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not state:
        raise ValueError(f"no tensors among the keys {', '.join(map(str, list(content)[:8]))}")
    return state


def find_weights(path: Path) -> Path:
    """The weights file that a path means: the path itself, or a folder's newest checkpoint.

    Raises:
        ValueError: nothing is there, or the folder holds no weights.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    newest_first = sorted(RunFolder(path).checkpoints.glob("step_*"), reverse=True)
    whole = [folder for folder in newest_first if _is_whole(folder)]
    for folder in (*whole, path):
        if (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
    for name in (INDEX_FILE, PICKLED_FILE):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path}: holds neither {WEIGHTS_FILE} nor a checkpoint")


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's weights have the size that its state.json states."""
    try:
        files = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["files"]
        return bool((checkpoint / WEIGHTS_FILE).stat().st_size == files[WEIGHTS_FILE]["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


# Keys of a weights file's metadata beside the architecture.
_METADATA_KEYS = ("mean", "std", "mask", "norm_target", "classes", "margin", "settings")


def trained_mask(path: str | Path) -> dict[str, Any]:
    """The mask of a checkpoint's training: "unit" in pixels and "ratio"; else the paper's.

    Raises:
        ValueError: the path has no weights.
    """
    published = {"unit": 32, "ratio": 0.6}
    file = find_weights(Path(path))
    metadata = plain_metadata(read_notes(file).get(METADATA_KEY))
    return metadata.get("mask") or published


def model_metadata(model: ImageModel, mask: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The metadata of a weights file: how to rebuild the model, and the mask of its training."""
    values: dict[str, Any] = {"mean": model.mean.tolist(), "std": model.std.tolist()}
    if isinstance(model, MaskedImageModel):
        values["mask"] = model.trained_mask(mask)
    values |= model.settings if model.settings_are_flat else {"settings": model.settings}
    return weights_metadata(model.kind, model.encoder.spec, values)


def weights_metadata(kind: str, spec: Spec, values: Mapping[str, Any]) -> dict[str, str]:
    """The same as `model_metadata`, from values instead of a model.

    Args:
        kind: as in `simmim.weights.load.Weights`.
        spec: the encoder's architecture.
        values: mean, std, mask, norm_target, classes, margin, as far as they are known.
    """
    known = {key: values[key] for key in _METADATA_KEYS if key in values}
    return {METADATA_KEY: json.dumps({"kind": kind, "encoder": spec_to_dict(spec), **known})}


def save_weights(model: ImageModel, path: Path, mask: MaskConfig | None = None) -> None:
    """Write a model's weights, with what `load_model` needs to rebuild it and its mask."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    values = None if mask is None else asdict(mask)
    save_tensors(tensors, path, model_metadata(model, values))


def best_weights(path: str | Path) -> Path:
    """The best weights, if a path is the folder of a fine-tuning run; else the path itself."""
    path = Path(path).expanduser()
    best = RunFolder(path).best_weights
    return best if best.is_file() else path
