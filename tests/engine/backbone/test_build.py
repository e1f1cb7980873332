"""Architectures are found by name, and come back from what a checkpoint stores."""

from dataclasses import replace

import pytest

from simmim.backbone.build import (
    PRESETS,
    SPEC_TYPES,
    find_preset,
    spec_from_dict,
    spec_to_dict,
)
from simmim.backbone.timm_backbone import TimmSpec

CHANGED = {"image_size": (96, 128), "channels": 5, "drop_path": 0.3}


@pytest.mark.parametrize(
    "name", ["swin_base", "swinv2_tiny", "vit_base", "resnet50", "convnext_tiny"]
)
def test_every_field_comes_back(name: str) -> None:
    spec = replace(find_preset(name), **CHANGED)
    stored = {k: list(v) if isinstance(v, tuple) else v for k, v in spec_to_dict(spec).items()}
    assert stored["arch"] == spec.arch
    assert spec_from_dict(stored) == spec


def test_names_of_timm_are_found_too() -> None:
    assert find_preset("timm:resnet50d") == TimmSpec(name="resnet50d")
    assert set(SPEC_TYPES) == {"swin", "swinv2", "vit", "resnet", "convnext", "timm"}


def test_unknown_names_fields_and_architectures_are_told() -> None:
    with pytest.raises(ValueError, match="swin_bsae is unknown; did you mean swin_base"):
        find_preset("swin_bsae")
    with pytest.raises(ValueError, match=f"zzzz is unknown; known are {', '.join(PRESETS)}"):
        find_preset("zzzz")
    with pytest.raises(ValueError, match="unknown fields of vit: a, b"):
        spec_from_dict({"arch": "vit", "b": 1, "a": 2})
    with pytest.raises(ValueError, match="unknown architecture None; known are"):
        spec_from_dict({"depth": 2})
