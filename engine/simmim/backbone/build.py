"""Finds encoders by name, and by the architecture that a checkpoint stores.

Every file of this package that has `PRESETS` (name → an `EncoderSpec`), `preset_for` (a name → an
`EncoderSpec` or None) or both is a backbone; no list names it.
"""

import difflib
import pkgutil
from dataclasses import asdict, fields
from importlib import import_module
from types import ModuleType
from typing import Any

from simmim import backbone
from simmim.backbone.encoder import Encoder as Encoder
from simmim.backbone.encoder import EncoderSpec

Spec = EncoderSpec


def _backbones() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(backbone.__path__) if m.name != "build"]
    modules = [import_module(f"{backbone.__name__}.{name}") for name in names]
    return [m for m in modules if hasattr(m, "PRESETS") or hasattr(m, "preset_for")]


_MODULES = _backbones()

PRESETS: dict[str, Spec] = {
    name: spec for module in _MODULES for name, spec in getattr(module, "PRESETS", {}).items()
}

SPEC_TYPES: dict[str, type[Spec]] = {
    value.arch: value
    for module in _MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, EncoderSpec) and value.arch
}


def find_preset(name: str) -> Spec:
    """The architecture that a model's name means.

    Raises:
        ValueError: no backbone knows the name; the message names similar ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    for module in _MODULES:
        spec: Spec | None = module.preset_for(name) if hasattr(module, "preset_for") else None
        if spec is not None:
            return spec
    near = difflib.get_close_matches(name, PRESETS, n=1)
    known = f"did you mean {near[0]}?" if near else f"known are {', '.join(PRESETS)}"
    raise ValueError(f"{name} is unknown; {known}")


def build_encoder(spec: Spec) -> Encoder:
    """The encoder that `spec` describes, freshly initialised from torch's generator."""
    return spec.build()


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """A dictionary of plain values that `spec_from_dict` turns back into `spec`."""
    return {"arch": spec.arch, **asdict(spec)}


def spec_from_dict(values: dict[str, Any]) -> Spec:
    """The architecture from plain values, as a checkpoint stores them.

    Raises:
        ValueError: an unknown architecture or field.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    arch = values.pop("arch", None)
    if arch not in SPEC_TYPES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(SPEC_TYPES)}")
    spec_type = SPEC_TYPES[arch]
    if unknown := set(values) - {f.name for f in fields(spec_type)}:
        raise ValueError(f"unknown fields of {arch}: {', '.join(sorted(unknown))}")
    return spec_type(**values)
