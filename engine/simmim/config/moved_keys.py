"""Keys that earlier versions had elsewhere, in TOML files, flags and checkpoints."""

from typing import Any

from simmim.config.values import leaf_types
from simmim.errors import ConfigError

# Where each of them stands now.
MOVED = {"model.norm_target": "method.norm_target"}


def current_key(key: str, cls: type) -> str:
    """What a key of an earlier version is called now; any other key is itself.

    Raises:
        ConfigError: runs of the class `cls` have no such key now.
    """
    if key not in MOVED:
        return key
    if MOVED[key] not in leaf_types(cls):
        raise ConfigError(
            f"{key} is {MOVED[key]} of method.name=simmim now, and this run has no such key: leave "
            "it out (method.name=tokens has method.target=normalised)"
        )
    return MOVED[key]


def moved_value(key: str, new_key: str) -> str:
    """The line that says where a key of an earlier version stands now."""
    return f"{key} is {new_key} now, and was taken as that"


def move_keys(
    values: dict[str, Any], cls: type, *, strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """Settings of an earlier version with the keys of this one.

    Args:
        values: nested, as TOML gives them; they stay as they are.
        cls: of the configuration.
        strict: refuse a value that has no place now, instead of leaving it out. One that is 0
            changed nothing, and is always left out.

    Returns:
        The settings, and a line for every key that moved.

    Raises:
        ConfigError: see `strict`.
    """
    moved = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
    notes = []
    for old in MOVED:
        section, name = old.split(".")
        place = moved.get(section)
        if not isinstance(place, dict) or name not in place:
            continue
        value = place.pop(name)
        if not value or (not strict and MOVED[old] not in leaf_types(cls)):
            continue
        new_key = current_key(old, cls)
        new_section, new_name = new_key.split(".")
        moved.setdefault(new_section, {}).setdefault(new_name, value)
        notes.append(moved_value(old, new_key))
    return moved, notes
