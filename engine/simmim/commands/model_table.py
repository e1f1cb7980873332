"""Every backbone with every method: parameters, multiplications, checkpoint layouts.

B batch, C channels, H W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simmim.backbone.build import PRESETS, Spec, build_encoder, find_preset
from simmim.backbone.layers import Backends
from simmim.config.sections import DataConfig, MethodConfig, ModelConfig
from simmim.config.spec import resolve_spec
from simmim.config.values import config_class
from simmim.errors import ConfigError
from simmim.method.build import method_class, methods
from simmim.weights.export import layouts_for


@dataclass(frozen=True)
class Entry:
    """A backbone.

    Attributes:
        name: of the preset.
        image_size: (height, width) in pixels that everything here is counted at.
        parameters: of the encoder, with its mask token.
        macs: multiply-accumulates of one image's forward pass through the encoder.
        methods: by method, the parameters of the whole module, heads included; only those that
            the backbone can be pre-trained with.
        layouts: checkpoint layouts that are read and written.
    """

    name: str
    image_size: tuple[int, int]
    parameters: int
    macs: int
    methods: dict[str, int]
    layouts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same in plain values."""
        return asdict(self)


def model_table(names: Sequence[str] = (), image_size: int | None = None) -> Iterator[Entry]:
    """What there is to train, an entry at a time: each takes about a second.

    Args:
        names: of backbones; () takes every preset.
        image_size: side in pixels; None takes each preset's own.

    Raises:
        ConfigError: an unknown name, or a size that does not fit one.
    """
    for name in names or PRESETS:
        yield _entry(name, image_size)


def _entry(name: str, image_size: int | None) -> Entry:
    try:
        preset = find_preset(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    size = (image_size, image_size) if image_size else preset.image_size
    spec = replace(preset, image_size=size)
    if problems := spec.problems():
        raise ConfigError(f"{name}: {'; '.join(message for _, message in problems)}")
    with torch.device("meta"):
        encoder = build_encoder(spec)
    return Entry(
        name,
        size,
        sum(parameter.numel() for parameter in encoder.parameters()),
        count_macs(spec),
        _methods_of(name, size),
        layouts_for(spec),
    )


def count_macs(spec: Spec) -> int:
    """Multiply-accumulates of one image's forward pass through the encoder.

    Those of convolutions, linear layers and the products of attention; norms, activations and
    additions, which some counters add, are left out. Nothing is computed, and no memory taken for
    weights.
    """
    with torch.device("meta"):
        encoder = build_encoder(spec)
    # the reference is written in PyTorch's own operations, which the counter knows
    encoder.backends = Backends("reference", "reference")
    encoder.eval()
    named = [*encoder.named_parameters(), *encoder.named_buffers()]
    counter = FlopCounterMode(display=False)
    # the CPU's fused attention is unknown to the counter, the products that it stands for are not
    plain = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(allow_non_fake_inputs=True), plain, counter, torch.no_grad():
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        image = torch.empty(1, spec.channels, *spec.image_size)
        functional_call(encoder, state, (image,))
    return int(counter.get_total_flops()) // 2


def _methods_of(name: str, size: tuple[int, int]) -> dict[str, int]:
    totals = {}
    for method in methods():
        settings = method_class(method).Settings
        config = config_class(settings)(
            model=ModelConfig(name=name),
            data=DataConfig(path=".", image_size=size),
            method=_named(settings, method),
        )
        try:
            chosen = method_class(method)(config)
            chosen.check()
        except ConfigError:
            continue
        with torch.device("meta"):
            module = chosen.build(build_encoder(resolve_spec(config)))
        totals[method] = sum(p.numel() for p in module.parameters())
    return totals


def _named(settings: type[MethodConfig], name: str) -> MethodConfig:
    return settings(name=name)
