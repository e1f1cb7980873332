"""Proves that a conversion changed nothing: the other library's model gives our outputs."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.vit import ViTSpec
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.weights import layouts
from simmim.weights.export import Export, to_layout, write
from simmim.weights.library_convnets import shapes_of_convnet
from simmim.weights.library_models import shapes_of_model
from simmim.weights.load import Weights, encoder_of, model_of
from simmim.weights.our_names import PREFIX

# Largest difference, relative to the largest output, that float32 on both sides explains.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Proof:
    """What was shown.

    Attributes:
        how: how it was shown, in words.
        difference: the largest difference between outputs, relative to the largest output; None
            if no outputs were compared.
    """

    how: str
    difference: float | None = None

    def line(self) -> str:
        """The proof in one line, for people."""
        if self.difference is None:
            return self.how
        return f"{self.how}: largest difference {self.difference:.1e} of the largest output"


def prove(weights: Weights, export: Export) -> Proof:
    """Check a conversion before it is written.

    The export is read back: every tensor that it kept must come back bit for bit. If the library
    is installed, its model is then built from the export and compared with ours on random images.
    If not, names and shapes are compared with those of the library's models.

    Raises:
        ValueError: a check failed; nothing should be written then.
    """
    _check_round_trip(weights, export)
    if export.layout in ("simmim", "official"):
        return Proof("read back bit for bit")
    _check_shapes(weights, export)
    library, rebuild = LIBRARIES[export.layout]
    if reason := why_missing(library):
        return Proof(
            f"read back bit for bit; names and shapes are {library}'s ({library} is not here: "
            f"{reason})"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's remarks on itself
        difference = _compare(_our_model(weights, export), weights, rebuild(export))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the model that {library} builds from it gives other numbers than ours (difference "
            f"{difference:.1e} of the largest output): not written (--no-proof would write it)"
        )
    return Proof(f"read back bit for bit; {library}'s model gives the same outputs", difference)


def prove_source(weights: Weights) -> Proof | None:
    """Check that weights in another program's layout were understood, by converting them back.

    Returns:
        None if nothing can be checked: the layout is the published one, or its library has no
        model that computes what ours does with the weights.

    Raises:
        ValueError: a check failed.
    """
    if weights.layout not in LIBRARIES:
        return None
    try:
        export = to_layout(weights, weights.layout)
    except ValueError:
        return None
    return prove(weights, export)


def why_missing(library: str) -> str:
    """Why a library cannot be imported, in a line; "" where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(library)
    except Exception as error:
        # timm imports torchvision, which raises errors of any kind beside a torch not its own
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _check_round_trip(weights: Weights, export: Export) -> None:
    _, read_back = layouts.to_ours(export.state, export.config)
    back = read_back.state
    for name, tensor in back.items():
        if name not in weights.state or not torch.equal(tensor, weights.state[name]):
            raise ValueError(f"{name} does not come back from the {export.layout} layout: a bug")
    lost = weights.state.keys() - back.keys()
    if lost != set(export.left_out):
        raise ValueError(
            f"lost in the {export.layout} layout: {', '.join(sorted(lost)[:4])}: a bug"
        )


def _check_shapes(weights: Weights, export: Export) -> None:
    num_classes = len(weights.state["head.weight"]) if export.kind == "classifier" else 0
    masked = f"{PREFIX}mask_token" in weights.state.keys() - set(export.left_out)
    if isinstance(weights.spec, ConvNetSpec):
        wanted = shapes_of_convnet(weights.spec, export.kind, num_classes, export.layout)
    else:
        wanted = shapes_of_model(export.layout, weights.spec, export.kind, num_classes, masked)
    shapes = {name: tuple(tensor.shape) for name, tensor in export.state.items()}
    differ = [n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n)]
    if differ:
        name = min(differ)
        raise ValueError(
            f"{name} is {shapes.get(name)} here and {wanted.get(name)} in {export.layout}'s model "
            f"({len(differ)} differ): not written"
        )


def _our_model(weights: Weights, export: Export) -> ImageModel:
    if export.kind == "encoder" or weights.kind == "encoder":
        return encoder_of(weights)
    return model_of(weights)


# (image, mask or None) → outputs of the other library's model
Forward = Callable[[Tensor, Tensor | None], Tensor]


@torch.no_grad()
def _compare(model: ImageModel, weights: Weights, forward: tuple[Forward, bool]) -> float:
    theirs, masks = forward
    spec = weights.spec
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, spec.channels, *spec.image_size, generator=generator)
    image[1] *= 0.02  # low contrast shows another epsilon of a norm
    mask = torch.rand(2, *spec.grid, generator=generator) < 0.6 if masks else None
    if isinstance(model, SimMIM) and masks:
        assert mask is not None
        ours = model.reconstruct(image, mask)
    elif isinstance(model, Classifier):
        ours = model(image)
    else:
        ours = model.encoder(image, mask)
    other = theirs(image, mask)
    if other.shape != ours.shape:
        raise ValueError(f"outputs are {tuple(other.shape)}, ours {tuple(ours.shape)}")
    return float((other - ours).abs().max() / ours.abs().max().clamp_min(1e-30))


def _rebuild_hf(export: Export) -> tuple[Forward, bool]:
    transformers = import_module("transformers")
    architecture = export.config["architectures"][0]
    import_module("transformers.utils.logging").disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write(export, Path(folder) / "model", {})
        loaded = getattr(transformers, architecture).from_pretrained(
            Path(folder) / "model", output_loading_info=True
        )
    model, info = loaded
    model = model.eval()
    strange = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    # the pooler of a bare model is no part of ours
    strange = [name for name in strange if "pooler" not in str(name)]
    if strange:
        raise ValueError(f"{architecture} does not take {strange[0]}: not written")

    def forward(image: Tensor, mask: Tensor | None) -> Tensor:
        arguments = {} if mask is None else {"bool_masked_pos": mask.flatten(1)}
        out = model(image, **arguments)
        if export.kind == "classifier":
            return torch.as_tensor(out.logits)
        if export.kind == "simmim":
            return torch.as_tensor(out.reconstruction)
        hidden = out.last_hidden_state
        if export.config["model_type"] in ("vit", "beit"):
            hidden = hidden[:, 1:]
        stride = export.config["encoder_stride"]
        return _as_map(hidden, image, stride)

    return forward, export.kind != "classifier" and "mask_token" in " ".join(export.state)


def _as_map(tokens: Tensor, image: Tensor, stride: int) -> Tensor:
    height, width = image.shape[2] // stride, image.shape[3] // stride
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def _rebuild_timm(export: Export) -> tuple[Forward, bool]:
    timm: Any = import_module("timm")
    model = timm.create_model(export.config["architecture"], **export.config["model_args"]).eval()
    _fill(model, export)

    def forward(image: Tensor, mask: Tensor | None) -> Tensor:
        if export.kind == "classifier":
            return torch.as_tensor(model(image))
        features = model.forward_features(image)
        if isinstance(export.spec, ConvNetSpec):
            return torch.as_tensor(features)
        if isinstance(export.spec, ViTSpec):
            return _as_map(features[:, 1:], image, export.spec.stride)
        return torch.as_tensor(features.permute(0, 3, 1, 2))

    return forward, False


def _rebuild_torchvision(export: Export) -> tuple[Forward, bool]:
    models: Any = import_module("torchvision.models")
    config = dict(export.config)
    if config["model"] == "ResNet":
        block: Any = getattr(import_module("torchvision.models.resnet"), config["block"])
        model = models.ResNet(block, config["layers"], num_classes=config["classes"] or 1)
        body, head = torch.nn.Sequential(*list(model.children())[:-2]), "fc"
    else:
        stage: Any = import_module("torchvision.models.convnext").CNBlockConfig
        setting = [stage(*values) for values in config["block_setting"]]
        model = models.ConvNeXt(setting, num_classes=config["classes"] or 1)
        body, head = model.features, "classifier"
    if export.kind == "encoder":
        setattr(model, head, torch.nn.Identity())
    model = model.eval()
    _fill(model, export)

    def forward(image: Tensor, mask: Tensor | None) -> Tensor:
        return torch.as_tensor(model(image) if export.kind == "classifier" else body(image))

    return forward, False


def _rebuild_mmpretrain(export: Export) -> tuple[Forward, bool]:
    import_module("mmpretrain.models")  # which registers them
    build = import_module("mmpretrain.registry").MODELS.build
    model = build(copy.deepcopy(export.config)).eval()
    _fill(model, export)
    masks = export.config["backbone"]["type"] == "SimMIMSwinTransformer"

    def forward(image: Tensor, mask: Tensor | None) -> Tensor:
        features = model.backbone(image, mask) if masks else model.backbone(image)
        if export.kind == "encoder":
            return torch.as_tensor(features[-1])
        if export.kind == "simmim":
            return torch.as_tensor(model.neck(features[-1]))
        return torch.as_tensor(model.head(model.neck(features)))

    return forward, masks


def _fill(model: torch.nn.Module, export: Export) -> None:
    try:
        model.load_state_dict(export.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(model).__name__} does not take it: {reason[:200]}") from None


# layout → its library, and the function that builds the library's model from an export: it returns
# what calls the model, and whether the model takes a mask.
LIBRARIES: dict[str, tuple[str, Callable[[Export], tuple[Forward, bool]]]] = {
    "hf": ("transformers", _rebuild_hf),
    "timm": ("timm", _rebuild_timm),
    "torchvision": ("torchvision", _rebuild_torchvision),
    "mmpretrain": ("mmpretrain", _rebuild_mmpretrain),
}
