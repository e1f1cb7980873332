"""Builds the model that a checkpoint of any layout belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from simmim.backbone.build import Spec, build_encoder, spec_from_dict
from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.vit import ViTSpec
from simmim.method.build import methods
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier, numbered_classes
from simmim.model.image_model import ImageModel
from simmim.model.weights_file import find_weights, read_weights, unwrap
from simmim.weights import convnet_layouts, layouts, official_layout
from simmim.weights.architecture import infer_spec
from simmim.weights.our_names import BUFFERS, PREFIX, Converted, kind_of

# Fields of an architecture that no shape depends on.
_UNSHAPED = ("num_heads", "qk_scale", "norm_eps", "window_size", "pretrained_window_sizes")


class ArchitectureHints(TypedDict, total=False):
    """Facts about an architecture that a file may not tell; None says nothing."""

    num_heads: int | None
    """Heads of a ViT that has no position table."""
    qk_scale: float | None
    """Factor of q·k; where nothing tells it, it is 1/√(head width)."""
    window_size: int | None
    """Window of a SwinV2 in tokens."""


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds, under our names, before a model is built from it.

    Attributes:
        source: the name of the file, for messages.
        layout: whose names the file has, one of `simmim.weights.layouts.LAYOUTS`.
        kind: the model's: a method's name, "classifier" with a class head, else "encoder".
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
    layout: str | None = None,
    **given: Unpack[ArchitectureHints],
) -> Weights:
    """A checkpoint's weights under our names, and its architecture.

    Args:
        path_or_state_dict: as for `load_model`.
        image_size: as for `load_model`.
        layout: whose names the file has, one of `simmim.weights.layouts.LAYOUTS`; None finds it
            out by the names.
        given: facts about the architecture, which are taken instead of what the file tells.

    Returns:
        Weights whose names and shapes are those of the architecture.

    Raises:
        ValueError: the file is unreadable, unsafe, of an unknown layout, incomplete, holds values
            that are not finite, or does not fit `image_size`; names it.
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
        _check_values(state)
        described = metadata.get("encoder", {})
        layout, converted = layouts.to_ours(state, config, layout, is_ours=bool(described))
        spec = spec_from_dict(described) if described else None
        if spec is None or size not in (None, spec.image_size):
            spec = _infer_spec(converted, layout, described, size, given)
        kind = metadata.get("kind")
        if (
            kind not in methods()
        ):  # files of other programs; and "classifier" and "encoder", which names tell
            kind = kind_of(converted.state)
        if metadata and official_layout.matches(state):
            layout = "simmim"
        weights = Weights(
            source, layout, kind, converted.state, spec, converted.metadata | metadata
        )
        _check_fits(weights)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        # damaged or hostile files contradict themselves in nearly any way
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"{source}: incomplete or inconsistent ({reason})") from None
    return weights


def _infer_spec(
    converted: Converted,
    layout: str,
    described: dict[str, Any],
    size: tuple[int, int] | None,
    given: ArchitectureHints,
) -> Spec:
    """The architecture of a checkpoint that does not describe it, or is to have another size.

    Args:
        converted: the checkpoint.
        layout: whose names it had.
        described: its encoder, as our metadata describes it; {} in files of other programs.
        size: (height, width) in pixels; None takes what the checkpoint tells.
        given: see `read_model`.
    """
    if described:
        spec = spec_from_dict(described)
        # a ConvNet has no shape that depends on the size; names of other backbones tell nothing
        if isinstance(spec, ConvNetSpec) or (
            layout == "simmim" and not official_layout.matches(converted.state)
        ):
            return replace(spec, image_size=size or spec.image_size)
    hints = {key: described[key] for key in _UNSHAPED if described.get(key) is not None}
    hints |= converted.hints
    hints |= {key: value for key, value in given.items() if value is not None}
    if given.get("window_size") is not None:
        hints.pop("windows", None)
    own_size = hints.pop("image_size", None)
    if size is None and own_size is not None:
        size = image_size_pair(own_size)
    return infer_spec(converted.state, size, **hints)


def load_model(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    *,
    norm_target: int | None = None,
    **given: Unpack[ArchitectureHints],
) -> ImageModel:
    """The model of a checkpoint, in evaluation mode on the CPU.

    The names in a file tell its layout: ours, that of microsoft/SimMIM, timm, torchvision, Hugging
    Face (a folder with config.json) or mmpretrain. The architecture is taken from the metadata or
    the configuration of the file, else from names and shapes.

    Args:
        path_or_state_dict: a weights file, a checkpoint folder, run folder, or folder of
            `save_pretrained`; or a state dict.
        image_size: side, or (height, width), in pixels; None takes what the checkpoint tells (the
            square on which the last stage is one window, where it tells nothing).
        norm_target: window of the target normalisation, which only the loss uses.
        given: see `ArchitectureHints`.

    Returns:
        A `SimMIM` (`encode`, `reconstruct`, and the loss when called), a `Classifier` (`encode`,
        and logits when called) where there is a class head, or the model of another method.

    Raises:
        ValueError: the file is unreadable, unsafe, of an unknown layout, holds values that are not
            finite, has neither decoder nor head, or does not fit `image_size`; names it.
    """
    return model_of(read_model(path_or_state_dict, image_size, **given), norm_target)


def load_encoder(
    path_or_state_dict: str | Path | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
    **given: Unpack[ArchitectureHints],
) -> ImageModel:
    """The encoder alone of any checkpoint that `read_model` reads, in evaluation mode on the CPU.

    Raises:
        ValueError: as of `load_model`, but not for a missing decoder or head.
    """
    return encoder_of(read_model(path_or_state_dict, image_size, **given))


def encoder_of(weights: Weights) -> ImageModel:
    """The encoder alone of weights that were read, in evaluation mode; see `load_encoder`."""
    return _filled(replace(weights, kind="encoder"), None)


def model_of(weights: Weights, norm_target: int | None = None) -> ImageModel:
    """The model of weights that were read, in evaluation mode; see `load_model`."""
    if weights.kind == "encoder":
        raise ValueError(
            f"{weights.source}: an encoder without decoder or class head; "
            "simmim.weights.load.load_encoder reads it, `simmim finetune` starts from it"
        )
    return _filled(weights, norm_target)


def _filled(weights: Weights, norm_target: int | None) -> ImageModel:
    try:
        model = _fresh(weights, norm_target)
        _load_state(model, _parts(weights))
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None
    return model.eval()


def _fresh(weights: Weights, norm_target: int | None) -> ImageModel:
    """The model that the weights belong to, freshly initialised."""
    metadata, encoder = weights.metadata, build_encoder(weights.spec)
    statistics = {"mean": metadata.get("mean"), "std": metadata.get("std")}
    if weights.kind == "simmim":
        norm_target = norm_target or metadata.get("norm_target")
        return SimMIM(encoder, norm_target=norm_target, **statistics)
    if weights.kind == "classifier":
        classes = _class_names(metadata.get("classes"), len(weights.state["head.weight"]))
        return Classifier(encoder, classes, **statistics, margin=metadata.get("margin"))
    if f"{PREFIX}mask_token" not in weights.state:
        encoder.mask_token = None
    if weights.kind == "encoder":
        return ImageModel(encoder, **statistics)
    settings = {str(name): value for name, value in dict(metadata.get("settings", {})).items()}
    return methods()[weights.kind].Model(encoder, **statistics, **settings)


def _parts(weights: Weights) -> dict[str, Tensor]:
    """The weights that a model of this kind has."""
    if weights.kind != "encoder":
        return weights.state
    return {k: v for k, v in weights.state.items() if k.startswith(PREFIX)}


def _check_fits(weights: Weights) -> None:
    """Compare names and shapes with the model's, before memory is taken for it.

    Raises:
        ValueError: some are missing, unknown or of another shape.
    """
    spec = weights.spec
    depth = spec.depth if isinstance(spec, ViTSpec) else sum(getattr(spec, "depths", ()))
    if depth > len(weights.state):
        raise ValueError(f"the architecture has {depth} blocks, more than there are weights")
    with torch.device("meta"):
        _check_names(_fresh(weights, None), _parts(weights))


def _class_names(names: Any, count: int) -> tuple[str, ...]:
    if names is None:
        return numbered_classes(count)
    if len(names) != count:
        raise ValueError(f"{len(names)} class names for a head of {count} classes")
    return tuple(str(name) for name in names)


def _check_values(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name.endswith(convnet_layouts.COUNTERS):
            convnet_layouts.check_counter(name, tensor)
            continue
        if name.endswith(BUFFERS) or tensor.is_meta:
            continue
        if not tensor.is_floating_point():
            if name.startswith(PREFIX) or name.endswith((".weight", ".bias")):
                raise ValueError(f"{name} holds {tensor.dtype} values, weights are floating point")
        elif not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds values that are not finite: the run that made it broke down; take "
                "an earlier checkpoint"
            )


def image_size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a side or a pair.

    Raises:
        ValueError: anything else.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"image_size is a side or (height, width) in pixels, not {image_size}")
    return pair


def _load_state(model: ImageModel, state: dict[str, Tensor]) -> None:
    _check_names(model, state)
    model.load_state_dict(state)


def _check_names(model: ImageModel, state: Mapping[str, Tensor]) -> None:
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
