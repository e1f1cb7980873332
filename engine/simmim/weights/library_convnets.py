"""Names and shapes of the ConvNets of timm and torchvision, which exports are checked against.

They are written after the libraries' models; see `simmim.weights.library_models`.
C width of a stage, K classes.
"""

from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.timm_backbone import TimmSpec
from simmim.weights.library_models import Shapes, linear, norm


def shapes_of_convnet(spec: ConvNetSpec, kind: str, num_classes: int, layout: str) -> Shapes:
    """Name and shape of every parameter and buffer of a library's model.

    Args:
        spec: the encoder's architecture.
        kind: "classifier" or "encoder", as the library's model is.
        num_classes: K.
        layout: "timm" or "torchvision".
    """
    if isinstance(spec, ResNetSpec):
        return _resnet(spec, num_classes if kind == "classifier" else 0)
    if isinstance(spec, ConvNeXtSpec):
        timm = layout == "timm"
        return (_timm_convnext if timm else _torchvision_convnext)(spec, kind, num_classes)
    assert isinstance(spec, TimmSpec)
    model = spec.build().model  # timm's own: nothing else tells its names
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _batch_norm(name: str, width: int) -> Shapes:
    shapes = norm(name, width) | {f"{name}.num_batches_tracked": ()}
    return shapes | {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}


def _convolution(name: str, inputs: int, outputs: int, side: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _resnet(spec: ResNetSpec, num_classes: int) -> Shapes:
    shapes = _batch_norm("bn1", spec.width)
    shapes["conv1.weight"] = (spec.width, spec.channels, 7, 7)
    inputs = spec.width
    for stage, depth in enumerate(spec.depths):
        C = spec.width << stage
        outputs = C * (4 if spec.bottleneck else 1)
        for number in range(depth):
            block = f"layer{stage + 1}.{number}"
            sides = (1, 3, 1) if spec.bottleneck else (3, 3)
            widths = [inputs, *[C] * (len(sides) - 1), outputs]
            for i, side in enumerate(sides, start=1):
                shapes[f"{block}.conv{i}.weight"] = (widths[i], widths[i - 1], side, side)
                shapes |= _batch_norm(f"{block}.bn{i}", widths[i])
            if inputs != outputs:
                shapes[f"{block}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes |= _batch_norm(f"{block}.downsample.1", outputs)
            inputs = outputs
    return shapes | (linear("fc", inputs, num_classes) if num_classes else {})


def _timm_convnext(spec: ConvNeXtSpec, kind: str, num_classes: int) -> Shapes:
    C = spec.widths[0]
    shapes = _convolution("stem.0", spec.channels, C, 4) | norm("stem.1", C)
    for stage, (C, depth) in enumerate(zip(spec.widths, spec.depths)):
        if stage:
            before = spec.widths[stage - 1]
            shapes |= norm(f"stages.{stage}.downsample.0", before)
            shapes |= _convolution(f"stages.{stage}.downsample.1", before, C, 2)
        for number in range(depth):
            block = f"stages.{stage}.blocks.{number}"
            shapes |= _convolution(f"{block}.conv_dw", 1, C, 7) | norm(f"{block}.norm", C)
            shapes |= linear(f"{block}.mlp.fc1", C, 4 * C) | linear(f"{block}.mlp.fc2", 4 * C, C)
            if spec.layer_scale is not None:
                shapes[f"{block}.gamma"] = (C,)
    shapes |= norm("head.norm", spec.widths[3])
    return shapes | (linear("head.fc", C, num_classes) if kind == "classifier" else {})


def _torchvision_convnext(spec: ConvNeXtSpec, kind: str, num_classes: int) -> Shapes:
    C = spec.widths[0]
    shapes = _convolution("features.0.0", spec.channels, C, 4) | norm("features.0.1", C)
    for stage, (C, depth) in enumerate(zip(spec.widths, spec.depths)):
        if stage:
            before = spec.widths[stage - 1]
            shapes |= norm(f"features.{2 * stage}.0", before)
            shapes |= _convolution(f"features.{2 * stage}.1", before, C, 2)
        for number in range(depth):
            block = f"features.{2 * stage + 1}.{number}"
            shapes |= _convolution(f"{block}.block.0", 1, C, 7) | norm(f"{block}.block.2", C)
            shapes |= linear(f"{block}.block.3", C, 4 * C)
            shapes |= linear(f"{block}.block.5", 4 * C, C)
            shapes[f"{block}.layer_scale"] = (C, 1, 1)
    if kind != "classifier":
        return shapes
    return shapes | norm("classifier.0", C) | linear("classifier.2", C, num_classes)
