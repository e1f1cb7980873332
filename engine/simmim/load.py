"""Reads weights from any file without running code in it, and builds the model they belong to."""

import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simmim.backbone.build import Spec, build_encoder, spec_from_dict, spec_to_dict
from simmim.convert import layouts, official
from simmim.method.classifier import Classifier
from simmim.method.images import ImageModel
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
        if "GLOBAL " in str(error) or "Unsupported class" in str(error):
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


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds, under our names, before a model is built from it.

    Attributes:
        source: where it comes from, for messages.
        layout: whose names it has: "simmim", "official", "timm", "hf" or "mmpretrain".
        kind: "simmim" with a decoder, "classifier" with a class head, else "encoder".
        state: name → tensor; `encoder.…`, `decoder.…`, `fc_norm.…`, `head.…`.
        spec: the encoder's architecture.
        metadata: mean, std, mask, classes and the like, as far as the file tells.
    """

    source: str
    layout: str
    kind: str
    state: dict[str, Tensor]
    spec: Spec
    metadata: dict[str, Any]


def read_model(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    num_heads: int | None = None,
    qk_scale: float | None = None,
) -> Weights:
    """A checkpoint's weights under our names, and its architecture; builds no model.

    Args:
        path_or_state_dict: as for `load_model`.
        image_size: as for `load_model`.
        num_heads: as for `load_model`.
        qk_scale: as for `load_model`.

    Raises:
        ValueError: the file is unreadable, unsafe, of an unknown layout, holds values that are not
            finite, or does not fit `image_size`; names it.
    """
    metadata: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if isinstance(path_or_state_dict, Mapping):
        source, state = "state dict", unwrap(path_or_state_dict)
    else:
        source = str(path_or_state_dict)
        state, metadata = read_weights(path_or_state_dict)
        config = layouts.read_config(find_weights(Path(path_or_state_dict)))
    size = None if image_size is None else image_size_pair(image_size)
    try:
        _check_finite(state)
        found = layouts.to_ours(state, config)
        hints = {"num_heads": num_heads, "qk_scale": qk_scale} | {
            key: value for key, value in found.hints.items() if value is not None
        }
        if metadata and size in (None, tuple(metadata["encoder"]["image_size"])):
            spec = spec_from_dict(metadata["encoder"])
        else:
            told = metadata.get("encoder", {})
            hints["qk_scale"] = hints["qk_scale"] or told.get("qk_scale")
            told_size = hints.pop("image_size", None)
            spec = official.infer_spec(found.state, size or told_size, **hints)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{source}: incomplete or inconsistent: {error!r}") from None
    kind = "encoder"
    if "decoder.0.weight" in found.state:
        kind = "simmim"
    elif "head.weight" in found.state:
        kind = "classifier"
    layout = "simmim" if metadata else found.layout
    return Weights(source, layout, kind, found.state, spec, found.metadata | metadata)


def load_model(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    num_heads: int | None = None,
    qk_scale: float | None = None,
    norm_target: int | None = None,
) -> SimMIM | Classifier:
    """The model of a checkpoint, in evaluation mode on the CPU.

    Layouts are told by their names: ours, microsoft/SimMIM, timm (Swin, BEiT), Hugging Face (Swin,
    ViT, BEiT; a folder with config.json) and mmpretrain. The architecture comes from the file
    itself: from its metadata or configuration, else from names and shapes.

    Args:
        path_or_state_dict: a weights file, a checkpoint folder, run folder, or folder of
            `save_pretrained`; or a state dict.
        image_size: side, or (height, width), in pixels; None takes what the checkpoint tells (the
            square on which the last stage is one window, where it tells nothing).
        num_heads: heads of a ViT that has no position table; shapes cannot tell.
        qk_scale: factor of q·k; shapes cannot tell; None is 1/√(head width).
        norm_target: window of the target normalisation, which only the loss uses.

    Returns:
        A `SimMIM` (`encode`, `reconstruct`, and the loss when called), or a `Classifier`
        (`encode`, and logits when called) where there is a class head.

    Raises:
        ValueError: the file is unreadable, unsafe, of an unknown layout, holds values that are not
            finite, has neither decoder nor head, or does not fit `image_size`; names it.
    """
    weights = read_model(path_or_state_dict, image_size, num_heads=num_heads, qk_scale=qk_scale)
    return build_model(weights, norm_target)


def load_encoder(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    num_heads: int | None = None,
    qk_scale: float | None = None,
) -> ImageModel:
    """The encoder alone of any checkpoint that `read_model` reads, in evaluation mode on the CPU.

    Raises:
        ValueError: see `load_model`; a missing decoder or head is no reason.
    """
    return encoder_of(
        read_model(path_or_state_dict, image_size, num_heads=num_heads, qk_scale=qk_scale)
    )


def encoder_of(weights: Weights) -> ImageModel:
    """The encoder alone of weights that were read, in evaluation mode; see `load_encoder`."""
    told = weights.metadata
    model = ImageModel(build_encoder(weights.spec), mean=told.get("mean"), std=told.get("std"))
    encoder = {k: v for k, v in weights.state.items() if k.startswith(official.PREFIX)}
    if f"{official.PREFIX}mask_token" not in encoder:
        model.encoder.mask_token = None
    try:
        _load_state(model, encoder)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None
    return model.eval()


def build_model(weights: Weights, norm_target: int | None = None) -> SimMIM | Classifier:
    """The model of weights that were read, in evaluation mode; see `load_model`."""
    told = weights.metadata
    model: SimMIM | Classifier
    try:
        if weights.kind == "encoder":
            raise ValueError(
                "an encoder without decoder or class head; simmim.load.load_encoder reads it, "
                "`simmim finetune` starts from it"
            )
        encoder = build_encoder(weights.spec)
        if weights.kind == "simmim":
            model = SimMIM(
                encoder,
                norm_target=norm_target or told.get("norm_target"),
                mean=told.get("mean"),
                std=told.get("std"),
            )
        else:
            model = Classifier(
                encoder,
                _class_names(told.get("classes"), len(weights.state["head.weight"])),
                mean=told.get("mean"),
                std=told.get("std"),
                margin=told.get("margin"),
            )
        _load_state(model, weights.state)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{weights.source}: incomplete or inconsistent: {error!r}") from None
    return model.eval()


def _class_names(names: Any, count: int) -> list[str]:
    if names is None:
        return [str(number) for number in range(count)]
    if len(names) != count:
        raise ValueError(f"{len(names)} class names for a head of {count} classes")
    return [str(name) for name in names]


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            if name.endswith("attn_mask"):
                continue
            raise ValueError(
                f"{name} holds values that are not finite: the run that made it broke down; take "
                "an earlier checkpoint"
            )


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


def _load_state(model: ImageModel, state: dict[str, Tensor]) -> None:
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


def model_metadata(model: ImageModel, mask: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a weights file carries: how to rebuild the model, and the mask it was trained with."""
    values: dict[str, Any] = {
        "encoder": spec_to_dict(model.encoder.spec),
        "mean": model.mean.tolist(),
        "std": model.std.tolist(),
    }
    if isinstance(model, SimMIM):
        values |= {"kind": "simmim", "mask": mask, "norm_target": model.norm_target}
    elif isinstance(model, Classifier):
        values |= {"kind": "classifier", "classes": model.classes, "margin": model.margin}
    return {METADATA_KEY: json.dumps(values)}
