"""Reads weights from any file without running code in it, and builds the model they belong to."""

import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simmim.backbone.build import build_encoder, spec_from_dict, spec_to_dict
from simmim.convert import official
from simmim.method.simmim import SimMIM

WEIGHTS_FILE = "model.safetensors"
METADATA_KEY = "simmim"


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a weights file; nothing in it is executed.

    Args:
        path: a .safetensors file, a file of torch.save (read with weights_only; a yacs
            configuration inside is read as plain values), a checkpoint folder or a run folder
            (its newest checkpoint).

    Returns:
        Names and CPU tensors (of a nested official file: its "model"), and our metadata ({} for
        foreign files).

    Raises:
        ValueError: no such file, not a weights file, or it would run code; names the path.
    """
    file = find_weights(Path(path))
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = (reader.metadata() or {}).get(METADATA_KEY)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            return tensors, _plain_metadata(metadata)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        if file.suffix == ".safetensors":
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    # the configuration in an official checkpoint is read as a plain dictionary: no yacs, no code
    plain: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]
    try:
        with torch.serialization.safe_globals(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle protocol
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            found = str(error).split("GLOBAL ")[-1].split(" ")[0]
            raise ValueError(
                f"{file}: refused, loading it would run code ({found}); only tensors and plain "
                "values are read. If you trust its source, re-save it as safetensors"
            ) from None
        raise ValueError(f"{file}: refused, not a plain weights file") from None
    except Exception as error:
        # damaged or hostile bytes make the restricted unpickler fail in nearly any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: not a readable weights file ({reason})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict")
    return unwrap(content), {}


def _plain_metadata(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        return {}  # of another program: names and shapes still tell
    return values if isinstance(values, dict) and isinstance(values.get("encoder"), dict) else {}


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside the wrappers that training programs save (`model`, `state_dict`)."""
    for key in ("model", "state_dict"):
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
    state = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"no tensors among the keys {', '.join(map(str, list(content)[:8]))}")
    return state


def find_weights(path: Path) -> Path:
    """The weights file that a path means: itself, or that of the newest checkpoint of a folder."""
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    newest_first = sorted((path / "checkpoints").glob("step_*"), reverse=True)
    whole = [folder for folder in newest_first if _is_whole(folder)]
    for folder in (*whole, path):
        if (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
    raise ValueError(f"{path}: holds neither {WEIGHTS_FILE} nor a checkpoint")


def _is_whole(checkpoint: Path) -> bool:
    """Whether the weights have the size that the checkpoint's state.json tells."""
    try:
        files = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["files"]
        return bool((checkpoint / WEIGHTS_FILE).stat().st_size == files[WEIGHTS_FILE]["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_model(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    num_heads: int | None = None,
    qk_scale: float | None = None,
    norm_target: int | None = None,
) -> SimMIM:
    """A SimMIM model with the weights of a checkpoint, in evaluation mode on the CPU.

    The architecture comes from the file itself: from the metadata of our own checkpoints, from
    names and shapes of official (microsoft/SimMIM) ones.

    Args:
        path_or_state_dict: a weights file, checkpoint folder or run folder; or a state dict.
        image_size: side, or (height, width), in pixels; None takes what the checkpoint tells (the
            square on which the last stage is one window, where it tells nothing).
        num_heads: heads of a ViT that has no position table; shapes cannot tell.
        qk_scale: factor of q·k; shapes cannot tell; None is 1/√(head width).
        norm_target: window of the target normalisation, which only the loss uses.

    Returns:
        The model: `encode`, `reconstruct`, and the loss when called.

    Raises:
        ValueError: the file is unreadable, unsafe, of an unknown layout, or does not fit
            `image_size`.
    """
    metadata: dict[str, Any] = {}
    if isinstance(path_or_state_dict, Mapping):
        source, state = "state dict", unwrap(path_or_state_dict)
    else:
        source = str(path_or_state_dict)
        state, metadata = read_weights(path_or_state_dict)
    if not official.matches(state):
        raise ValueError(
            f"{source}: unknown layout; expected encoder.patch_embed.proj.weight and "
            f"decoder.0.weight, found {', '.join(sorted(state)[:4])}, …"
        )
    size = None if image_size is None else image_size_pair(image_size)
    try:
        if metadata and size in (None, tuple(metadata["encoder"]["image_size"])):
            spec = spec_from_dict(metadata["encoder"])
        else:
            spec = official.infer_spec(
                state, size, num_heads, qk_scale or metadata.get("encoder", {}).get("qk_scale")
            )
        model = SimMIM(
            build_encoder(spec),
            norm_target=norm_target or metadata.get("norm_target"),
            mean=metadata.get("mean"),
            std=metadata.get("std"),
        )
        _load_state(model, official.parameters(state))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{source}: incomplete or inconsistent: {error!r}") from None
    return model.eval()


def trained_mask(path: str | Path) -> dict[str, Any]:
    """{"unit": pixels, "ratio": share} a checkpoint was trained with; the paper's if unsaid."""
    published = {"unit": 32, "ratio": 0.6}
    file = find_weights(Path(path))
    if file.suffix != ".safetensors":
        return published
    with safe_open(file, framework="pt") as reader:
        metadata = _plain_metadata((reader.metadata() or {}).get(METADATA_KEY))
    return metadata.get("mask") or published


def image_size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a side or a pair."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def _load_state(model: SimMIM, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    for what, names in (
        ("missing", sorted(own.keys() - state.keys())),
        ("unknown", sorted(state.keys() - own.keys())),
        ("of another shape", sorted(wrong)),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(f"weights {what}: {', '.join(names[:4])}{more}")
    model.load_state_dict(state)


def model_metadata(model: SimMIM, mask: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a weights file carries: how to rebuild the model, and the mask it was trained with."""
    values = {
        "mask": mask,
        "encoder": spec_to_dict(model.encoder.spec),
        "norm_target": model.norm_target,
        "mean": model.mean.tolist(),
        "std": model.std.tolist(),
    }
    return {METADATA_KEY: json.dumps(values)}
