"""The layouts of ConvNets: timm's, torchvision's, and ours, which is timm's with a prefix.

A ResNet has the same names in both libraries. torchvision numbers the modules of a ConvNeXt
(`features.1.0.block.0` is `stages.0.blocks.0.conv_dw`) and keeps its gains as [C, 1, 1]. The
running statistics of batch norms are converted too. Neither library has a place for mask token and
decoder.

K classes.
"""

from typing import Any

import torch
from torch import Tensor

from simmim.backbone import timm_backbone
from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.timm_backbone import TimmSpec
from simmim.weights.architecture import CONVNEXT_NAME, RESNET_NAME, TIMM_PREFIX, is_convnet
from simmim.weights.our_names import PREFIX, Converted, State
from simmim.weights.renaming import Renaming
from simmim.weights.timm_config import hints_of_config

LIBRARIES = ("timm", "torchvision")

# How the names of batch norms' counts of batches end: no other integers are kept.
COUNTERS = ".num_batches_tracked"

# A name that every ConvNeXt of torchvision has.
_TORCHVISION_NAME = "features.1.0.block.0.weight"
_TIMM = f"{PREFIX}{TIMM_PREFIX}"

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
    return is_convnet(state) or any(
        name in state for name in (RESNET_NAME, CONVNEXT_NAME, _TORCHVISION_NAME)
    )


def is_of_timm(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of an encoder which is a model of timm, exported by us."""
    return str(config.get("encoder", "")).startswith(timm_backbone.PREFIX)


def layout_of(state: State, config: dict[str, Any], wanted: str | None = None) -> str:
    """Whose names they are; a ResNet has the same in both libraries, and a configuration decides.

    Args:
        state: for which `matches` is true.
        config: of timm; {} for none.
        wanted: whose names they should be; None if nobody says so.

    Raises:
        ValueError: they are others than `wanted`.
    """
    layout = "simmim" if is_convnet(state) else "timm"
    if is_of_timm(config):
        layout = "timm"
    elif _TORCHVISION_NAME in state or (RESNET_NAME in state and "architecture" not in config):
        layout = "torchvision"
    if wanted not in (None, layout) and (RESNET_NAME not in state or wanted not in LIBRARIES):
        raise ValueError(f"the names are {layout}'s, not those of {wanted}")
    return wanted or layout


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """The parameters under our names; see `simmim.weights.hf_layout.to_ours`."""
    if is_convnet(state):
        return Converted(dict(state), {}, {})
    if is_of_timm(config):
        return Converted({_TIMM + name: tensor for name, tensor in state.items()}, {}, {})
    if _TORCHVISION_NAME in state:
        state = {
            _NUMBERED.to_ours(name) or name: tensor.flatten()
            if name.endswith(".layer_scale")
            else tensor
            for name, tensor in state.items()
        }
    heads = _HEADS["resnet" if RESNET_NAME in state else "convnext"]
    if "head.fc.weight" not in state:
        # this model has no classes, and its norm of the mean was never trained
        state = {name: t for name, t in state.items() if not name.startswith("head.norm.")}
    renamed = {heads.to_ours(name) or PREFIX + name: tensor for name, tensor in state.items()}
    hints, metadata = hints_of_config(config)
    return Converted(renamed, {"image_size": hints["image_size"]}, metadata)


def from_ours(
    state: State, spec: ConvNetSpec, kind: str, layout: str
) -> tuple[State, dict[str, Any]]:
    """The parameters under the library's names, and what builds its model.

    Args:
        state: under our names, without what `masking_names` names.
        spec: the architecture.
        kind: "classifier" or "encoder".
        layout: one of LIBRARIES.

    Raises:
        ValueError: the library has no model that computes the same.
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
    timms = {heads.to_theirs(name) or name.removeprefix(PREFIX): t for name, t in state.items()}
    if not isinstance(spec, ConvNeXtSpec):
        return timms, config
    if layout == "timm":
        if kind == "encoder":  # a fresh norm, as timm's model has one that features do not pass
            timms |= {
                "head.norm.weight": torch.ones(spec.widths[3]),
                "head.norm.bias": torch.zeros(spec.widths[3]),
            }
        return timms, config
    return {
        str(_NUMBERED.to_theirs(name)): t.view(-1, 1, 1) if name.endswith(".gamma") else t
        for name, t in timms.items()
    }, config


def _of_timm(state: State, spec: TimmSpec, kind: str, layout: str) -> tuple[State, dict[str, Any]]:
    if layout != "timm":
        raise ValueError(f"a model of timm ({spec.name}) has no place in {layout}'s")
    if kind == "classifier":
        raise ValueError(
            f"the head of a classifier of timm's {spec.name} is ours alone; its encoder is timm's"
        )
    arguments = {"in_chans": spec.channels, "num_classes": 0}
    theirs = {name.removeprefix(_TIMM): tensor for name, tensor in state.items()}
    # "encoder" says that it is to be read back as timm's model, and not as a ResNet of ours
    name = timm_backbone.PREFIX + spec.name
    return theirs, {"architecture": spec.name, "model_args": arguments, "encoder": name}


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
        # create_model ignores None; 0 means no gains as well
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


def check_counter(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a batch norm's count of batches is a whole number, at least 0."""
    if tensor.dtype != torch.int64 or tensor.dim() or (not tensor.is_meta and tensor < 0):
        raise ValueError(f"{name} holds {tensor.dtype} {tuple(tensor.shape)}, no count of batches")
