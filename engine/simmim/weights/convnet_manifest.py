"""Names and shapes of the ConvNets of timm and torchvision: what an export is checked against.

Written from their models, not from our renaming; see `simmim.weights.manifest`.
C width of a stage, K classes.
"""

from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.timm_backbone import TimmSpec

Manifest = dict[str, tuple[int, ...]]


def expected(spec: ConvNetSpec, kind: str, num_classes: int, layout: str) -> Manifest:
    """Every parameter and buffer of a library's model; see `simmim.weights.manifest`."""
    if isinstance(spec, ResNetSpec):
        return _resnet(spec, num_classes if kind == "classifier" else 0)
    if isinstance(spec, ConvNeXtSpec):
        timm = layout == "timm"
        return (_timm_convnext if timm else _torchvision_convnext)(spec, kind, num_classes)
    assert isinstance(spec, TimmSpec)
    model = spec.build().model  # theirs: what there is to check against
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _linear(name: str, inputs: int, outputs: int) -> Manifest:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Manifest:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _batch_norm(name: str, width: int) -> Manifest:
    found = _norm(name, width) | {f"{name}.num_batches_tracked": ()}
    return found | {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}


def _convolution(name: str, inputs: int, outputs: int, side: int) -> Manifest:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _resnet(spec: ResNetSpec, num_classes: int) -> Manifest:
    found = _batch_norm("bn1", spec.width)
    found["conv1.weight"] = (spec.width, spec.channels, 7, 7)
    inputs = spec.width
    for stage, depth in enumerate(spec.depths):
        C = spec.width << stage
        outputs = C * (4 if spec.bottleneck else 1)
        for number in range(depth):
            block = f"layer{stage + 1}.{number}"
            sides = (1, 3, 1) if spec.bottleneck else (3, 3)
            widths = [inputs, *[C] * (len(sides) - 1), outputs]
            for i, side in enumerate(sides, start=1):
                found[f"{block}.conv{i}.weight"] = (widths[i], widths[i - 1], side, side)
                found |= _batch_norm(f"{block}.bn{i}", widths[i])
            if inputs != outputs:
                found[f"{block}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                found |= _batch_norm(f"{block}.downsample.1", outputs)
            inputs = outputs
    return found | (_linear("fc", inputs, num_classes) if num_classes else {})


def _timm_convnext(spec: ConvNeXtSpec, kind: str, num_classes: int) -> Manifest:
    C = spec.widths[0]
    found = _convolution("stem.0", spec.channels, C, 4) | _norm("stem.1", C)
    for stage, (C, depth) in enumerate(zip(spec.widths, spec.depths)):
        if stage:
            before = spec.widths[stage - 1]
            found |= _norm(f"stages.{stage}.downsample.0", before)
            found |= _convolution(f"stages.{stage}.downsample.1", before, C, 2)
        for number in range(depth):
            block = f"stages.{stage}.blocks.{number}"
            found |= _convolution(f"{block}.conv_dw", 1, C, 7) | _norm(f"{block}.norm", C)
            found |= _linear(f"{block}.mlp.fc1", C, 4 * C) | _linear(f"{block}.mlp.fc2", 4 * C, C)
            if spec.layer_scale is not None:
                found[f"{block}.gamma"] = (C,)
    found |= _norm("head.norm", spec.widths[3])
    return found | (_linear("head.fc", C, num_classes) if kind == "classifier" else {})


def _torchvision_convnext(spec: ConvNeXtSpec, kind: str, num_classes: int) -> Manifest:
    C = spec.widths[0]
    found = _convolution("features.0.0", spec.channels, C, 4) | _norm("features.0.1", C)
    for stage, (C, depth) in enumerate(zip(spec.widths, spec.depths)):
        if stage:
            before = spec.widths[stage - 1]
            found |= _norm(f"features.{2 * stage}.0", before)
            found |= _convolution(f"features.{2 * stage}.1", before, C, 2)
        for number in range(depth):
            block = f"features.{2 * stage + 1}.{number}"
            found |= _convolution(f"{block}.block.0", 1, C, 7) | _norm(f"{block}.block.2", C)
            found |= _linear(f"{block}.block.3", C, 4 * C)
            found |= _linear(f"{block}.block.5", 4 * C, C)
            found[f"{block}.layer_scale"] = (C, 1, 1)
    if kind != "classifier":
        return found
    return found | _norm("classifier.0", C) | _linear("classifier.2", C, num_classes)
