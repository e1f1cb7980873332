"""ConvNets in the layouts of timm and torchvision, and ours, which is timm's with a prefix.

A ResNet has the same names in both libraries. torchvision numbers the modules of a ConvNeXt
(`features.1.0.block.0` is `stages.0.blocks.0.conv_dw`) and keeps its gains as [C, 1, 1]. Running
statistics of batch norms go with the weights. Neither has a place for mask token and decoder.

K classes.
"""

import re
from typing import Any

import torch
from torch import Tensor

from simmim.backbone import timm_backbone
from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.timm_backbone import TimmSpec
from simmim.weights.official import PREFIX, Converted, State, told
from simmim.weights.renaming import Renaming

LIBRARIES = ("timm", "torchvision")

# Counts of batches, beside the running statistics of batch norms: the only integers that count.
COUNTERS = ".num_batches_tracked"

# What tells a ResNet and a ConvNeXt, under the names of timm and, for the last, of torchvision.
_RESNET = "layer1.0.conv1.weight"
_CONVNEXT = "stages.0.blocks.0.conv_dw.weight"
_TORCHVISION = "features.1.0.block.0.weight"
_TIMM = f"{PREFIX}model."

# Where no checkpoint of them tells: any size that the stride divides would do.
_IMAGE_SIZE = (224, 224)

_HEADS = {
    "resnet": Renaming([("head", "fc")]),
    "convnext": Renaming([("fc_norm", "head.norm"), ("head", "head.fc")]),
}

_OF_BLOCKS = {
    "conv_dw": "block.0",
    "norm": "block.2",
    "mlp.fc1": "block.3",
    "mlp.fc2": "block.5",
    "gamma": "layer_scale",
}
_NUMBERED = Renaming(
    [
        ("stem", "features.0"),
        *(
            (f"stages.{stage}.blocks.*.{ours}", f"features.{2 * stage + 1}.*.{theirs}")
            for stage in range(4)
            for ours, theirs in _OF_BLOCKS.items()
        ),
        *((f"stages.{stage}.downsample", f"features.{2 * stage}") for stage in range(1, 4)),
        ("head.norm", "classifier.0"),
        ("head.fc", "classifier.2"),
    ]
)


def matches(state: State) -> bool:
    """Whether the names are those of a ResNet or ConvNeXt: ours, timm's or torchvision's."""
    return is_ours(state) or any(name in state for name in (_RESNET, _CONVNEXT, _TORCHVISION))


def is_ours(state: State) -> bool:
    """Whether the names are those of a convolutional encoder of ours."""
    known = PREFIX + _RESNET in state or PREFIX + _CONVNEXT in state
    return known or any(name.startswith(_TIMM) for name in state)


def is_of_timm(config: dict[str, Any]) -> bool:
    """Whether it is the configuration of an exported encoder that is a model of timm."""
    return str(config.get("encoder", "")).startswith(timm_backbone.PREFIX)


def layout_of(state: State, config: dict[str, Any], wanted: str | None = None) -> str:
    """Whose names they are; a ResNet's are timm's where a configuration of timm is with them.

    Args:
        state: for which `matches` is true.
        config: of timm; {} for none.
        wanted: whose they are said to be.

    Raises:
        ValueError: they are not.
    """
    found = "simmim" if is_ours(state) else "timm"
    if is_of_timm(config):
        found = "timm"
    elif _TORCHVISION in state or (_RESNET in state and "architecture" not in config):
        found = "torchvision"
    if wanted not in (None, found) and (_RESNET not in state or wanted not in LIBRARIES):
        raise ValueError(f"the names are {found}'s, not those of {wanted}")
    return wanted or found


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """Our names for theirs; see `simmim.weights.hf.to_ours`."""
    if is_ours(state):
        return dict(state), {}, {}
    if is_of_timm(config):
        return {_TIMM + name: tensor for name, tensor in state.items()}, {}, {}
    if _TORCHVISION in state:
        state = {
            _NUMBERED.to_ours(name) or name: tensor.flatten()
            if name.endswith(".layer_scale")
            else tensor
            for name, tensor in state.items()
        }
    heads = _HEADS["resnet" if _RESNET in state else "convnext"]
    if "head.fc.weight" not in state:
        # of a model without classes, whose norm of the mean no features have passed
        state = {name: t for name, t in state.items() if not name.startswith("head.norm.")}
    found = {heads.to_ours(name) or PREFIX + name: tensor for name, tensor in state.items()}
    hints, metadata = told(config)
    return found, {"image_size": hints["image_size"]}, metadata


def left_out(state: State, kind: str) -> list[str]:
    """Our names that have no place there: of mask token and decoder."""
    parts = ("decoder.", f"{PREFIX}mask_token") + (("fc_norm.",) if kind == "encoder" else ())
    return [name for name in state if name.startswith(parts)]


def from_ours(
    state: State, spec: ConvNetSpec, kind: str, layout: str
) -> tuple[State, dict[str, Any]]:
    """Their names for ours, and what builds the model there.

    Args:
        state: under our names, without what `left_out` names.
        spec: the architecture.
        kind: "classifier" or "encoder".
        layout: one of LIBRARIES.

    Raises:
        ValueError: they have no model that computes the same.
    """
    if layout not in LIBRARIES:
        raise ValueError(f"{layout} has no place for a ConvNet here; choose timm or torchvision")
    classes = len(state["head.weight"]) if kind == "classifier" else 0
    if isinstance(spec, TimmSpec):
        return _of_timm(state, spec, kind, layout)
    if layout == "torchvision":
        config = _torchvision_config(spec, classes)
    else:
        config = _timm_config(spec, classes)
    heads = _HEADS[spec.arch]
    found = {heads.to_theirs(name) or name.removeprefix(PREFIX): t for name, t in state.items()}
    if not isinstance(spec, ConvNeXtSpec):
        return found, config
    if layout == "timm":
        if kind == "encoder":  # as a fresh model of theirs has it, which features do not pass
            found |= {
                "head.norm.weight": torch.ones(spec.widths[3]),
                "head.norm.bias": torch.zeros(spec.widths[3]),
            }
        return found, config
    return {
        str(_NUMBERED.to_theirs(name)): t.view(-1, 1, 1) if name.endswith(".gamma") else t
        for name, t in found.items()
    }, config


def _of_timm(state: State, spec: TimmSpec, kind: str, layout: str) -> tuple[State, dict[str, Any]]:
    if layout != "timm":
        raise ValueError(f"a model of timm ({spec.name}) has no place in {layout}'s")
    if kind == "classifier":
        raise ValueError(
            f"the head of a classifier of timm's {spec.name} is ours alone; its encoder is timm's"
        )
    arguments = {"in_chans": spec.channels, "num_classes": 0}
    found = {name.removeprefix(_TIMM): tensor for name, tensor in state.items()}
    # "encoder" says that it is to be read back as timm's model, and not as a ResNet of ours
    name = timm_backbone.PREFIX + spec.name
    return found, {"architecture": spec.name, "model_args": arguments, "encoder": name}


def _timm_config(spec: ConvNetSpec, classes: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "in_chans": spec.channels,
        "num_classes": classes,
        "drop_path_rate": spec.drop_path,
    }
    if isinstance(spec, ResNetSpec):
        name = "resnet50" if spec.bottleneck else "resnet18"
        arguments["layers"] = list(spec.depths)
        if spec.width != 64:
            arguments |= {"stem_width": spec.width}
            arguments["channels"] = [spec.width << stage for stage in range(4)]
    else:
        assert isinstance(spec, ConvNeXtSpec)
        name = "convnext_tiny"
        arguments |= {"depths": list(spec.depths), "dims": list(spec.widths)}
        # create_model passes over None; 0 has no gains either
        arguments["ls_init_value"] = spec.layer_scale or 0.0
    size = [spec.channels, *spec.image_size]
    return {"architecture": name, "model_args": arguments, "pretrained_cfg": {"input_size": size}}


def _torchvision_config(spec: ConvNetSpec, classes: int) -> dict[str, Any]:
    if spec.channels != 3:
        raise ValueError(f"torchvision's models take 3 channels, this encoder {spec.channels}")
    if isinstance(spec, ResNetSpec):
        if spec.width != 64:
            raise ValueError(f"torchvision's ResNets are 64 wide, this one {spec.width}")
        block = "Bottleneck" if spec.bottleneck else "BasicBlock"
        return {"model": "ResNet", "block": block, "layers": list(spec.depths), "classes": classes}
    assert isinstance(spec, ConvNeXtSpec)
    if spec.layer_scale is None:
        raise ValueError("torchvision's ConvNeXts have gains (layer_scale), this one has none")
    nexts = [*spec.widths[1:], None]
    setting = [list(stage) for stage in zip(spec.widths, nexts, spec.depths)]
    return {"model": "ConvNeXt", "block_setting": setting, "classes": classes}


def infer_spec(state: State, image_size: tuple[int, int] | None) -> ConvNetSpec:
    """The architecture of a ResNet or ConvNeXt under our names.

    Args:
        state: for which `is_ours` is true.
        image_size: (height, width) in pixels; None takes 224: shapes cannot tell.

    Raises:
        ValueError: it is a model of timm, of which names do not tell.
    """
    encoder = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    size = image_size or _IMAGE_SIZE
    if _RESNET in encoder:
        width, channels = encoder["conv1.weight"].shape[:2]
        return ResNetSpec(
            image_size=size,
            channels=channels,
            depths=tuple(_count(encoder, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5)),
            bottleneck="layer1.0.conv3.weight" in encoder,
            width=width,
        )
    if _CONVNEXT not in encoder:
        raise ValueError("which model of timm this is, only the metadata of our own files tells")
    blocks = [f"stages.{stage}.blocks." for stage in range(4)]
    return ConvNeXtSpec(
        image_size=size,
        channels=encoder["stem.0.weight"].shape[1],
        depths=tuple(_count(encoder, rf"{re.escape(block)}(\d+)\.") for block in blocks),
        widths=tuple(len(encoder[f"{block}0.conv_dw.weight"]) for block in blocks),
        layer_scale=1e-6 if f"{blocks[0]}0.gamma" in encoder else None,
    )


def _count(encoder: State, pattern: str) -> int:
    found = [re.match(pattern, name) for name in encoder]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def check_counter(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a batch norm's count of batches is a whole number, at least 0."""
    if tensor.dtype != torch.int64 or tensor.dim() or (not tensor.is_meta and tensor < 0):
        raise ValueError(f"{name} holds {tensor.dtype} {tuple(tensor.shape)}, no count of batches")
