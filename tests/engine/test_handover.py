"""Hand-over of weights: the published tables and logits, every key accounted for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import INDEX, assert_close_to, load_golden, with_prefix
from simmim.backbone.build import PRESETS, Spec, build_encoder, spec_from_dict
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.downstream.handover import finetune_spec, hand_over
from simmim.downstream.position_tables import remap_table, source_positions, spline_matrix
from simmim.load import Weights, read_model
from simmim.method.classifier import Classifier
from simmim.method.simmim import SimMIM

CASES = sorted(name for name in INDEX if name.startswith("handover-"))
SWIN = SwinSpec(
    image_size=(48, 48), embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=6, patch_size=4
)
VIT = ViTSpec(image_size=(64, 64), embed_dim=12, depth=2, num_heads=2, absolute_position=True)


def published_spec(model: dict[str, Any], side: int) -> Spec:
    names = {"arch": "arch", "patch_size": "patch_size", "embed_dim": "embed_dim"}
    values: dict[str, Any] = {ours: model[theirs] for ours, theirs in names.items()}
    values |= {
        "image_size": (side, side),
        "num_heads": model["num_heads"],
        "mlp_ratio": model["mlp_ratio"],
    }
    if model["arch"] == "vit":
        values |= {
            "depth": model["depth"],
            "layer_scale": model["init_values"],
            "shared_relative_position": model["use_shared_rel_pos_bias"],
            "layer_relative_position": model["use_rel_pos_bias"],
            "final_norm": not model["use_mean_pooling"],
        }
    else:
        values |= {"depths": model["depths"], "window_size": model["window_size"]}
    return spec_from_dict(values)


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def weights_of(model: SimMIM | Classifier, **metadata: Any) -> Weights:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = "simmim" if isinstance(model, SimMIM) else "classifier"
    return Weights("x.safetensors", "simmim", kind, state, model.encoder.spec, metadata)


@pytest.mark.parametrize("name", CASES)
def test_published_handover(name: str) -> None:
    entry, tensors = load_golden(name)
    if "swinv2" in name and "swinv2_tiny" not in PRESETS:
        pytest.skip("no SwinV2 here yet")
    weights = read_model(with_prefix(tensors, "weights/"), entry["image_size_pretrain"])
    assert weights.spec == published_spec(entry["pretrain"], entry["image_size_pretrain"])
    at_size = published_spec(entry["finetune"], entry["image_size_finetune"])
    spec = finetune_spec(at_size, weights.spec)
    model = Classifier(build_encoder(spec), "abcdefg")
    report = hand_over(weights, model)

    def ours(names: list[str]) -> set[str]:
        heads = ("head.", "fc_norm.")
        buffers = ("index", "attn_mask", "coords_table")
        kept = [n for n in names if not n.endswith(buffers)]
        return {n if n.startswith(heads) else f"encoder.{n}" for n in kept}

    decoder = {n for n in weights.state if n.startswith("decoder.")}
    assert set(report.new) == ours(entry["missing_keys"])
    assert set(report.unused) - decoder == ours(entry["unexpected_keys"])
    state = {n.removeprefix("encoder."): t for n, t in model.state_dict().items()}
    expected = with_prefix(tensors, "expect/state/")
    initial = with_prefix(tensors, "finetune_init/")
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        if f"encoder.{key}" in report.remapped:
            assert_close_to(state[key], tensor, entry["tolerance"]["state"], key)
        elif key not in initial:
            assert torch.equal(state[key], tensor), key
    model.load_state_dict(
        {
            n if n.startswith(("head.", "fc_norm.")) else f"encoder.{n}": initial.get(n, t)
            for n, t in state.items()
        }
    )
    logits = model.eval()(tensors["input/image"])
    assert_close_to(logits, tensors["expect/logits"], entry["tolerance"]["logits"], "logits")


@pytest.mark.parametrize(
    ("sides", "entry", "key"),
    [((6, 7), "handover-swin-w6-to-w7", "11->13"), ((4, 6), "handover-vit-4x4-to-6x6", "7->11")],
)
def test_positions_are_the_published_ones(sides: tuple[int, int], entry: str, key: str) -> None:
    expected = INDEX[entry]["interpolation"]["per_table_size"][key]
    positions = source_positions(*sides)
    half = expected["source_positions_positive_half"]
    assert positions[len(positions) // 2 :] == pytest.approx(half, rel=1e-12)
    assert np.array_equal(positions, -positions[::-1])


def test_the_published_ratio_of_the_large_model() -> None:
    positions = source_positions(12, 14)
    assert positions[-1] - positions[-2] == pytest.approx(1.032893**10, rel=1e-5)
    assert positions[-1] == pytest.approx(13.0, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_splines_reproduce_cubics_and_their_own_points(n: int) -> None:
    positions = np.cumsum(np.linspace(1.0, 2.0, n))
    wanted = np.linspace(positions[0], positions[-1], 13)
    degree = min(n - 1, 3)
    values = np.polyval([0.3, -1.1, 0.7, 2.0][3 - degree :], positions)
    expected = np.polyval([0.3, -1.1, 0.7, 2.0][3 - degree :], wanted)
    np.testing.assert_allclose(spline_matrix(positions, wanted) @ values, expected, rtol=1e-9)
    np.testing.assert_allclose(spline_matrix(positions, positions), np.eye(n), atol=1e-12)


def table(window: tuple[int, int], seed: int = 0) -> Tensor:
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", [(2, 2), (7, 7), (6, 9), (9, 4), (14, 14)])
@pytest.mark.parametrize("source", [(6, 6), (4, 7), (2, 3), (1, 5)])
def test_tables_of_any_window(source: tuple[int, int], target: tuple[int, int]) -> None:
    moved = remap_table(table(source), source, target)
    assert moved.shape == ((2 * target[0] - 1) * (2 * target[1] - 1), 3)
    assert moved.isfinite().all()
    assert torch.allclose(
        remap_table(torch.full_like(table(source), 0.7), source, target), torch.tensor(0.7)
    )
    # the value of no offset stays, and mirrored tables stay mirrored
    middle = moved.view(2 * target[0] - 1, 2 * target[1] - 1, 3)[target[0] - 1, target[1] - 1]
    rows, columns = 2 * source[0] - 1, 2 * source[1] - 1
    before = table(source).view(rows, columns, 3)
    assert torch.allclose(middle, before[source[0] - 1, source[1] - 1], atol=1e-6)
    mirrored = remap_table(before.flip(1).reshape(-1, 3), source, target)
    shape = (2 * target[0] - 1, 2 * target[1] - 1, 3)
    assert torch.allclose(mirrored.view(shape), moved.view(shape).flip(1), atol=1e-6)
    transposed = remap_table(
        before.transpose(0, 1).reshape(-1, 3), source[::-1], target[::-1]
    ).view(shape[1], shape[0], 3)
    assert torch.allclose(transposed.transpose(0, 1), moved.view(shape), atol=1e-6)


def test_equal_windows_change_nothing() -> None:
    assert torch.equal(remap_table(table((5, 3)), (5, 3), (5, 3)), table((5, 3)))
    with pytest.raises(ValueError, match="is not of a window of 6×6"):
        remap_table(table((5, 5)), (6, 6), (7, 7))


def test_a_non_square_image_and_absolute_positions() -> None:
    before = SimMIM(build_encoder(VIT))
    fill(before)
    spec = finetune_spec(replace(VIT, image_size=(64, 96)))
    model = Classifier(build_encoder(spec), "ab")
    report = hand_over(weights_of(before), model)
    assert report.remapped["encoder.pos_embed"] == "positions 4×4 → 4×6, bicubic"
    first = "encoder.blocks.0.attn.relative_position_bias_table"
    assert report.remapped[first] == "copy of the shared table, window 4×4 → 4×6"
    state = model.state_dict()
    assert torch.equal(state[first][-3:], before.state_dict()[SHARED][-3:])
    old = before.state_dict()["encoder.pos_embed"]
    assert torch.equal(state["encoder.pos_embed"][:, 0], old[:, 0])
    # a position that grows linearly along the rows still does so inside
    assert model.eval()(torch.zeros(1, 3, 64, 96)).isfinite().all()
    assert report.new == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert "encoder.norm.weight" in report.unused
    listed = report.lines()
    assert listed[0].startswith("weights of x.safetensors: ")
    told = {line.split()[1].rstrip(":") for line in listed[1:]}
    assert told == set(weights_of(before).state) - {SHARED} | set(state)


SHARED = "encoder.rel_pos_bias.relative_position_bias_table"


def test_a_classifier_keeps_its_head_for_the_same_classes_only() -> None:
    before = Classifier(build_encoder(SWIN), "abc")
    fill(before)
    weights = weights_of(before, classes=["a", "b", "c"])
    same, other = Classifier(build_encoder(SWIN), "abc"), Classifier(build_encoder(SWIN), "abd")
    assert not hand_over(weights, same).new
    assert torch.equal(same.head.weight, before.head.weight)
    report = hand_over(weights, other)
    assert report.new == ["head.bias", "head.weight"] == sorted(report.unused)
    assert not torch.equal(other.head.weight, before.head.weight)


def test_other_architectures_are_refused_and_change_nothing() -> None:
    before = SimMIM(build_encoder(SWIN))
    for spec, words in [
        (replace(SWIN, embed_dim=16), "width 8.*width 16.*embed_dim 8 ≠ 16"),
        (replace(SWIN, depths=(1, 1)), r"depths \(2, 1\) ≠ \(1, 1\)"),
        (replace(SWIN, mlp_ratio=2.0), "mlp_ratio"),
        (VIT, "holds a Swin .*, the model is a ViT"),
    ]:
        model = Classifier(build_encoder(spec), "ab")
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"x\.safetensors: .*{words}"):
            hand_over(weights_of(before), model)
        assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items())


def test_a_key_that_fits_nowhere_is_an_error() -> None:
    weights = weights_of(SimMIM(build_encoder(SWIN)))
    weights.state["encoder.layers.0.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.extra has no place"):
        hand_over(weights, Classifier(build_encoder(SWIN), "ab"))
    del weights.state["encoder.layers.0.extra"], weights.state["encoder.norm.bias"]
    with pytest.raises(ValueError, match=r"encoder\.norm\.bias is missing"):
        hand_over(weights, Classifier(build_encoder(SWIN), "ab"))


def test_reads_from_a_file(tmp_path: Path) -> None:
    from simmim.checkpoint import save_weights

    before = SimMIM(build_encoder(SWIN))
    fill(before)
    save_weights(before, tmp_path / "model.safetensors")
    weights = read_model(tmp_path / "model.safetensors")
    model = Classifier(build_encoder(replace(SWIN, image_size=(96, 96), window_size=12)), "ab")
    report = hand_over(weights, model)
    assert len(report.remapped) == 3
    assert all(how == "window 6×6 → 12×12" for how in report.remapped.values())
