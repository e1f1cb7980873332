"""Proofs of conversions: the other library's outputs, or its names and shapes."""

from dataclasses import replace

import pytest
import torch

from layout_cases import CASES, LIBRARIES, is_here, make_weights
from simmim.method.simmim import SimMIM
from simmim.weights import proof as proving
from simmim.weights.export import to_layout
from simmim.weights.load import Weights, load_model
from simmim.weights.proof import prove


@pytest.mark.parametrize(("layout", "name", "kind"), CASES)
def test_every_layout_proves_itself(layout: str, name: str, kind: str) -> None:
    weights = make_weights(name, kind)
    export = to_layout(weights, layout)
    found = prove(weights, export)
    if is_here(LIBRARIES.get(layout, "")):
        assert found.difference is not None
        assert found.difference < 1e-5
    else:
        assert found.difference is None


def test_a_wrong_conversion_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights("swin", "simmim")
    export = to_layout(weights, "hf")
    one = next(key for key in export.state if key.endswith("layernorm_before.weight"))
    with pytest.raises(ValueError, match="does not come back"):
        prove(weights, replace(export, state=export.state | {one: export.state[one] + 1}))
    less = {key: tensor for key, tensor in export.state.items() if key != one}
    with pytest.raises(ValueError, match="lost in the hf layout"):
        prove(weights, replace(export, state=less))
    extra = {"swin.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"weights unknown: swin\.extra"):
        prove(weights, replace(export, state=export.state | extra))
    # one that reads back well, but whose outputs differ
    monkeypatch.setattr(proving, "_our_model", lambda *_: load_other(weights))
    with pytest.raises(ValueError, match="gives other numbers than ours"):
        prove(weights, export)


def load_other(weights: Weights) -> SimMIM:
    model = load_model({key: 1.01 * tensor for key, tensor in weights.state.items()}, 32)
    assert isinstance(model, SimMIM)
    return model


def test_without_the_library_names_and_shapes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "why_missing", lambda library: "No module")
    for layout, name, kind in [
        ("hf", "swin", "simmim"),
        ("hf", "swin", "classifier"),
        ("hf", "plain-vit", "simmim"),
        ("hf", "vit", "simmim"),
        ("hf", "tuned-vit", "classifier"),
        ("timm", "swin", "simmim"),
        ("timm", "tuned-vit", "classifier"),
    ]:
        weights = make_weights(name, kind)
        line = prove(weights, to_layout(weights, layout)).line()
        assert "names and shapes are" in line
        assert "No module" in line
