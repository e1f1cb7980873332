"""From [model] keys to an encoder's architecture."""

from dataclasses import fields, replace
from typing import Any

from simmim.backbone.build import Spec, find_preset
from simmim.backbone.vit import ViTSpec
from simmim.config.sections import Config, ModelConfig
from simmim.errors import ConfigError

# Fields of ModelConfig that are not the architecture's, and those where one stage has a number.
_NOT_OF_SPEC = ("name", "drop_path")

_OF_ONE_STAGE = {"depths": "depth", "num_heads": "num_heads"}


def resolve_spec(config: Config) -> Spec:
    """The encoder's architecture: the preset with the configured fields in place.

    Raises:
        ConfigError: unknown preset, a field of the other family, or parts that do not fit.
    """
    return make_spec(config.model, config.image_size, config.data.channels)


def make_spec(
    model: ModelConfig, image_size: tuple[int, int], channels: int, preset: Spec | None = None
) -> Spec:
    """An encoder's architecture: a preset with the configured fields in place.

    Args:
        model: the configured fields.
        image_size: (height, width) in pixels.
        channels: of the images.
        preset: instead of the one that `model.name` names.

    Raises:
        ConfigError: unknown preset, a field of the other family, or parts that do not fit.
    """
    if preset is None:
        try:
            preset = find_preset(model.name)
        except ValueError as error:
            raise ConfigError(f"model.name={error}") from None
    given: dict[str, Any] = {
        f.name: getattr(model, f.name) for f in fields(ModelConfig) if f.name not in _NOT_OF_SPEC
    }
    given = {name: _as_tuple(value) for name, value in given.items() if value is not None}
    known = {f.name for f in fields(preset)}
    if "depth" in known:  # one stage: a number where others have a list
        given = {_OF_ONE_STAGE.get(name, name): v for name, v in _single(given, model).items()}
    for name in given:
        if name not in known:
            family = model.name or f"a {preset.arch}"
            raise ConfigError(f"model.{name} has no meaning for {family}; leave it out")
    spec: Spec = replace(
        preset, image_size=image_size, channels=channels, drop_path=model.drop_path, **given
    )
    if isinstance(spec, ViTSpec) and spec.layer_scale == 0:
        spec = replace(spec, layer_scale=None)
    if not getattr(spec, "depths", (1,)):
        raise ConfigError("model.depths=() must be the number of blocks of every stage")
    for field_name, message in spec.problems():
        section = "data" if field_name == "image_size" else "model"
        raise ConfigError(f"{section}.{field_name}: {message}")
    return spec


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _single(given: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Lists of one number → the number."""
    for name in _OF_ONE_STAGE.keys() & given.keys():
        if len(given[name]) != 1:
            raise ConfigError(
                f"model.{name}={list(given[name])}: {model.name} takes one number, such as [12]"
            )
    return {name: v[0] if name in _OF_ONE_STAGE else v for name, v in given.items()}
