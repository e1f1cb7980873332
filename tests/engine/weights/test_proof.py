"""Proofs of conversions: the other library's outputs, or its names and shapes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layout_cases import CASES, LIBRARIES, is_here, make_weights
from simmim.method.simmim import SimMIM
from simmim.weights import proof as proving
from simmim.weights.export import to_layout
from simmim.weights.load import Weights, encoder_of, load_model
from simmim.weights.proof import prove, prove_source


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


@pytest.mark.parametrize(("difference", "accepted"), [(9e-5, True), (2e-4, False)])
@pytest.mark.parametrize("nan", [False, True])
def test_outputs_may_differ_by_a_ten_thousandth_of_the_largest(
    monkeypatch: pytest.MonkeyPatch, difference: float, accepted: bool, nan: bool
) -> None:
    weights = make_weights("swin", "simmim")
    export = to_layout(weights, "hf")
    ours = encoder_of(weights).encoder

    def forward(image: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None
        out = ours(image)
        largest = out.abs().max()
        out[0, 0, 0, 0] += difference * largest * (torch.nan if nan else 1)
        return out

    monkeypatch.setattr(proving, "why_missing", lambda library: "")
    monkeypatch.setitem(proving.LIBRARIES, "hf", ("theirs", lambda _: (forward, False)))
    if accepted and not nan:
        proof = prove(weights, export)
        assert proof.difference == pytest.approx(difference, rel=0.02)
        assert "theirs's model gives the same outputs: largest difference 9." in proof.line()
        return
    with pytest.raises(ValueError, match="theirs builds from it gives other numbers"):
        prove(weights, export)


def test_a_masked_model_is_compared_under_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights("swin", "simmim")
    shares: list[float] = []
    model = load_other(weights)

    def forward(image: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        shares.append(mask.float().mean().item())
        return model.reconstruct(image, mask)

    monkeypatch.setattr(proving, "why_missing", lambda library: "")
    monkeypatch.setattr(proving, "_our_model", lambda *_: model)
    monkeypatch.setitem(proving.LIBRARIES, "hf", ("theirs", lambda _: (forward, True)))
    assert prove(weights, to_layout(weights, "hf")).difference == 0
    assert shares == [pytest.approx(0.6, abs=0.15)]


def test_outputs_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights("swin", "simmim")
    monkeypatch.setattr(proving, "why_missing", lambda library: "")
    made = (lambda image, mask: torch.zeros(1), False)
    monkeypatch.setitem(proving.LIBRARIES, "hf", ("theirs", lambda _: made))
    with pytest.raises(ValueError, match=r"outputs are \(1,\), ours \(2, 32, 2, 2\)"):
        prove(weights, to_layout(weights, "hf"))


def test_names_and_shapes_that_are_not_the_library_s_are_refused() -> None:
    weights = make_weights("swin", "simmim")
    export = to_layout(weights, "timm")
    other = replace(weights, spec=replace(weights.spec, window_size=1))
    with pytest.raises(ValueError, match=r"position_bias_table is .* in timm's model \(\d+ differ"):
        prove(other, export)


def test_sources_are_proved_where_a_library_knows_them() -> None:
    weights = make_weights("swin", "simmim")
    assert prove_source(weights) is None
    proof = prove_source(replace(weights, layout="hf"))
    assert proof is not None
    assert proof.how.startswith("read back bit for bit")
