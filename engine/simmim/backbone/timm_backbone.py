"""Any convolutional model of timm as an encoder of masked images: model.name = "timm:NAME".

This is the only file that imports timm for models. It learns the structure of a model by running
it once on the meta device, which computes nothing.
B batch, C channels, H W pixels, h w cells of the mask grid, D width of the stem.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simmim.backbone.convnet import ConvNet, ConvNetSpec, raise_problems, run_once_more

PREFIX = "timm:"

# Side in pixels of the image that a model is tried on: a multiple of any usual stride.
_TRIAL = 256


@dataclass(frozen=True)
class TimmSpec(ConvNetSpec):
    """A model of timm; what a checkpoint stores to rebuild it.

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        drop_path: `drop_path_rate` of timm's model.
        name: name of timm's model, such as "resnet50d".
    """

    name: str = ""

    arch: ClassVar[str] = "timm"

    @property
    def stride(self) -> int:
        """Pixels per side of an output cell; the linear head's stride."""
        return look_at(self.name, self.channels).stride

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        try:
            look_at(self.name, self.channels)
        except ValueError as error:
            return [("name", str(error))]
        return self.size_problems()

    def build(self) -> "TimmEncoder":
        """The encoder, freshly initialised from torch's generator."""
        return TimmEncoder(self)


def preset_for(name: str) -> TimmSpec | None:
    """The architecture that a model.name of "timm:NAME" means; None for any other name."""
    return TimmSpec(name=name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


@dataclass(frozen=True)
class Anatomy:
    """The structure of a model, as a trial run showed it.

    Attributes:
        place: name of the module where the mask token is put in.
        before: whether it is put into the input of `place`, or else into its output.
        stem_width: channels of the map there, whose stride is 4.
        num_features: channels of the output.
        stride: pixels per side of an output cell.
        stages: names of the modules after that place that end a stage.
        layers: module → number of stages that had ended before it ran; 0 in the stem.
        idle: names of children that features do not need, such as the head's norm.
    """

    place: str
    before: bool
    stem_width: int
    num_features: int
    stride: int
    stages: tuple[str, ...]
    layers: dict[str, int]
    idle: tuple[str, ...]


def import_timm() -> Any:
    """Import timm.

    Raises:
        ValueError: it is not installed, or cannot be imported; the message says what to do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's remarks on itself
            return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise ValueError("timm's models need timm: pip install timm") from None
        reason = str(error)
    except Exception as error:
        # timm imports torchvision, which raises many kinds of error with a torch that does not fit
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(
        f"timm's models need timm, which cannot be imported ({reason}); install a torchvision that "
        "fits this torch: pip install timm torchvision"
    )


def create(name: str, channels: int, drop_path: float = 0.0) -> nn.Module:
    """Create timm's model without a class head, freshly initialised; nothing is downloaded.

    Raises:
        ValueError: there is no such model, or it does not take these options.
    """
    timm = import_timm()
    # a checkpoint's name is untrusted: only timm's own models, by plain names
    if ":" in name or "/" in name or not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:6]}*")[:4]) if name else ""
        hint = f"; there are {near}, …" if near else "; timm.list_models() names them"
        raise ValueError(f"timm has no model {name}{hint}")
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = timm.create_model(name, **options)
    except Exception as error:
        # every model has its own constructor, which may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"timm's {name} cannot be built with {options}: {reason}") from None
    return model


@lru_cache(maxsize=32)
def look_at(name: str, channels: int) -> Anatomy:
    """Learn the structure of timm's model from a trial run.

    Raises:
        ValueError: see `create`; or the end of the model's stem cannot be found.
    """
    with torch.device("meta"):
        model = create(name, channels).eval()
        trial = torch.empty(1, channels, _TRIAL, _TRIAL)
    try:
        calls, out = _watch(model, trial)
        stages = _ends_of_stages(model)
    except Exception as error:
        # every model runs its own code, which may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"timm's {name} does not run on any image size: {reason}") from None
    return _told_by(name, model, calls, out, stages)


# (module's name, shape of its input, shape of its output), in the order in which modules ended
_Calls = list[tuple[str, torch.Size | None, torch.Size | None]]


def _watch(model: nn.Module, image: Tensor) -> tuple[_Calls, torch.Size | None]:
    calls: _Calls = []

    def note(name: str, _module: nn.Module, inputs: Any, out: Any) -> None:
        first = inputs[0] if inputs else None
        calls.append((name, _shape(first), _shape(out)))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        forward: Any = model.forward_features
        out = forward(image)
    return calls, _shape(out)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) and value.dim() == 4 else None


def _ends_of_stages(model: nn.Module) -> list[tuple[str, int]]:
    """(module, stride) of every stage of a model according to timm, first to last."""
    information: Any = model.feature_info
    return [(info["module"], info["reduction"]) for info in information]


def _told_by(
    name: str,
    model: nn.Module,
    calls: _Calls,
    out: torch.Size | None,
    stages: list[tuple[str, int]],
) -> Anatomy:
    places = [module for module, reduction in stages if reduction == 4]
    shapes = {module: (inside, outside) for module, inside, outside in calls}
    inside, outside = shapes.get(places[0], (None, None)) if places else (None, None)
    before = _stride(inside) == 4
    hidden = inside if before else outside
    if _stride(hidden) != 4 or hidden is None:
        raise ValueError(
            f"where the stem of timm's {name} ends cannot be told: no module puts out a map "
            "[B, C, H/4, W/4] as its feature_info says"
        )
    stride = _stride(out)
    if out is None or stride is None or stride < 4:
        raise ValueError(
            f"timm's {name} puts out features {None if out is None else tuple(out)} for images of "
            f"{_TRIAL} px, no map [B, C, H/s, W/s]"
        )
    place, order = places[0], [module for module, _, _ in calls]
    # stages that end at the token's place or later, in the order in which they run
    ends = [m for m, _ in stages if m in order and order.index(m) >= order.index(place)]
    first = order.index(ends[0])
    inner = {module for module in order[: first + 1] if module.startswith(f"{place}.")} | {place}
    stem = [m for m in order[: first + 1] if not before or m not in inner]
    return Anatomy(
        place=place,
        before=before,
        stem_width=hidden[1],
        num_features=out[1],
        stride=stride,
        stages=tuple(ends),
        layers=_layers(order, ends, set(stem), before),
        idle=tuple(child for child, _ in model.named_children() if not _runs(child, order)),
    )


def _stride(shape: torch.Size | None) -> int | None:
    """The stride of a map of the trial image; None if it is no map of whole cells."""
    if shape is None or shape[2] != shape[3] or shape[2] < 1 or _TRIAL % shape[2]:
        return None
    return _TRIAL // shape[2]


def _runs(child: str, order: list[str]) -> bool:
    return any(module == child or module.startswith(f"{child}.") for module in order)


def _layers(order: list[str], ends: list[str], stem: set[str], before: bool) -> dict[str, int]:
    layer_of: dict[str, int] = {}
    # if the token goes after the first end, the stage before it is part of the stem
    layer = 1 if before else 0
    for module in order:
        layer_of.setdefault(module, 0 if module in stem else layer)
        if module in ends and module not in stem | {ends[-1]}:
            layer += 1
        elif module in stem and module == ends[0]:
            layer = 1
    return layer_of


class TimmEncoder(ConvNet):
    """A ConvNet of timm with a mask token where its map has a stride of 4.

    The token goes before the first stage if the stem alone reaches this stride (ResNet, ConvNeXt),
    and otherwise after the stage that reaches it (RegNet, EfficientNet).

    Args:
        spec: the architecture, which names the model.

    Raises:
        ValueError: timm is not installed or has no such model, the end of its stem cannot be found,
            or the image size does not fit.
    """

    spec: TimmSpec

    def __init__(self, spec: TimmSpec) -> None:
        raise_problems(spec.problems())
        self._anatomy = look_at(spec.name, spec.channels)
        super().__init__(spec, self._anatomy.stem_width, self._anatomy.num_features)
        self.model = create(spec.name, spec.channels, spec.drop_path)
        for child in self._anatomy.idle:
            # DistributedDataParallel would wait for the gradients of its parameters
            setattr(self.model, child, nn.Identity())
        assert self.mask_token is not None
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._mask: Tensor | None = None
        place = self.model.get_submodule(self._anatomy.place)
        # bound methods: a deep copy of the encoder gets its own
        if self._anatomy.before:
            place.register_forward_pre_hook(self._hide_input)
        else:
            place.register_forward_hook(self._hide_output)

    def blocks_in_order(self) -> list[nn.Module]:
        """The stages after the mask token; see `ConvNet`."""
        return [self.model.get_submodule(name) for name in self._anatomy.stages]

    @property
    def num_layers(self) -> int:
        """See `Encoder`; a stage is a layer."""
        return max(self._anatomy.layers.values())

    def encode(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """See `ConvNet`; a hook puts the token in on the way."""
        self._mask = mask
        forward: Any = self.model.forward_features
        try:
            with self._recomputing():
                features: Tensor = forward(image)
        finally:
            self._mask = None
        return features

    def layer_of(self, name: str) -> int:
        """See `Encoder`; everything that runs before the end of a stage belongs to it."""
        owner, layers = name.removeprefix("model.").rpartition(".")[0], self._anatomy.layers
        while owner not in layers and owner:
            owner = owner.rpartition(".")[0]
        return layers.get(owner, 0) if name.startswith("model.") else 0

    def _hide_input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.hide(inputs[0], self._mask), *inputs[1:])

    def _hide_output(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return self.hide(out, self._mask)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Have stages compute their activations again if `activation_checkpointing` is set.

        timm's own checkpointing would count every batch twice in the statistics of batch norms.
        """
        if not (self.activation_checkpointing and self.training):
            yield
            return
        with ExitStack() as stack:
            for stage in self.blocks_in_order():
                if next(stage.parameters(), None) is None:
                    continue  # an activation that ends a stage is not a stage
                # this replaces the method while features are computed; hooks stay outside
                again = partial(run_once_more, stage.forward, stage, True)
                stage.__dict__["forward"] = again
                stack.callback(stage.__dict__.pop, "forward")
            yield
