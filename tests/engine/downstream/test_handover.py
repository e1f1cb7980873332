"""Hand-over of weights: the published tables and logits, every key accounted for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from numerics import GOLDEN, INDEX, assert_close_to, with_prefix
from simmim.backbone.build import Spec, build_encoder, spec_from_dict
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.downstream.handover import finetune_spec, hand_over, resize_positions
from simmim.downstream.position_tables import remap_table
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.weights.load import Weights, read_model

# Fixtures of equal sizes, cut down: what is copied as it is stands in them once.
CUT = {f["name"]: f for f in json.loads((GOLDEN / "handover-index.json").read_text())["fixtures"]}
CASES = {name: entry for name, entry in (INDEX | CUT).items() if name.startswith("handover-")}
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


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_handover(name: str) -> None:
    entry = CASES[name]
    tensors = load_file(GOLDEN / entry["file"])
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
    if name in CUT:
        unused = {*entry["unexpected_keys"], SHARED.removeprefix("encoder.")}
        kept = with_prefix(tensors, "weights/encoder.").items()
        expected = {key: t for key, t in kept if key not in unused} | initial | expected
    assert state.keys() == expected.keys()
    sizes = (entry["image_size_pretrain"], entry["image_size_finetune"])
    assert any("→" in how for how in report.remapped.values()) == (
        sizes[0] != sizes[1] and "swinv2" not in name
    )
    for key, tensor in expected.items():
        if "→" in report.remapped.get(f"encoder.{key}", ""):
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
    assert torch.equal(
        state["encoder.pos_embed"][:, 1:], resize_positions(old[:, 1:], (4, 4), (4, 6))
    )
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
    from simmim.model.weights_file import save_weights

    before = SimMIM(build_encoder(SWIN))
    fill(before)
    save_weights(before, tmp_path / "model.safetensors")
    weights = read_model(tmp_path / "model.safetensors")
    model = Classifier(build_encoder(replace(SWIN, image_size=(96, 96), window_size=12)), "ab")
    report = hand_over(weights, model)
    assert len(report.remapped) == 3
    assert all(how == "window 6×6 → 12×12" for how in report.remapped.values())


def test_positions_are_resized_along_each_axis() -> None:
    # a ramp along the rows takes two rows for what was one; columns stay as they are
    ramp = torch.arange(8.0).view(8, 1).expand(8, 4).reshape(1, 32, 1)
    moved = resize_positions(ramp, (8, 4), (16, 4)).view(16, 4)
    assert torch.allclose(moved[6:12] - moved[4:10], torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(moved, moved[:, :1])
    # as torch makes it of pictures
    positions = torch.randn(1, 15, 6, generator=torch.Generator().manual_seed(0))
    picture = positions.view(3, 5, 6).permute(2, 0, 1)[None]
    picture = F.interpolate(picture, size=(7, 4), mode="bicubic", align_corners=False)
    moved = resize_positions(positions, (3, 5), (7, 4))
    assert torch.equal(moved.view(7, 4, 6).permute(2, 0, 1)[None], picture)


def test_absolute_positions_of_a_swin() -> None:
    spec = replace(SWIN, absolute_position=True)
    before = SimMIM(build_encoder(spec))
    fill(before)
    weights = weights_of(before)
    model = Classifier(build_encoder(replace(spec, image_size=(48, 96))), "ab")
    report = hand_over(weights, model)
    name = "encoder.absolute_pos_embed"
    assert report.remapped == {name: "positions 12×12 → 12×24, bicubic"}
    moved = resize_positions(weights.state[name], (12, 12), (12, 24))
    assert torch.equal(model.state_dict()[name], moved)


def test_continues_pretraining_at_another_size() -> None:
    before = SimMIM(build_encoder(SWIN))
    fill(before)
    # the second stage of 12 × 6 tokens has windows of 6 still
    model = SimMIM(build_encoder(replace(SWIN, image_size=(96, 48), window_size=12)))
    report = hand_over(weights_of(before), model)
    assert not report.new
    assert not report.unused
    first = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    assert set(report.remapped.values()) == {"window 6×6 → 12×12"}
    assert set(report.remapped) == {first, first.replace("blocks.0", "blocks.1")}
    state, old = model.state_dict(), before.state_dict()
    assert torch.equal(state[first], remap_table(old[first], (6, 6), (12, 12)))
    for name in report.loaded:
        assert torch.equal(state[name], old[name]), name
    # a classifier has no decoder and no mask token to give
    report = hand_over(weights_of(Classifier(build_encoder(SWIN), "ab")), model)
    assert report.new == ["decoder.0.bias", "decoder.0.weight", "encoder.mask_token"]
    assert report.unused == ["head.weight", "head.bias"]


def test_equal_models_say_the_same() -> None:
    torch.manual_seed(0)
    for spec in (SWIN, replace(VIT, shared_relative_position=False, layer_relative_position=True)):
        before, after = (Classifier(build_encoder(spec), "abc") for _ in range(2))
        fill(before)
        report = hand_over(weights_of(before), after)
        assert sorted(report.loaded) == sorted(before.state_dict())
        assert report.summary() == f"weights of x.safetensors: {len(report.loaded)} loaded"
        image = torch.randn(2, 3, *spec.image_size)
        assert torch.equal(before.eval()(image), after.eval()(image))


def test_tables_beside_a_shared_one_give_way() -> None:
    spec = replace(VIT, shared_relative_position=True, layer_relative_position=True)
    before = SimMIM(build_encoder(spec))
    fill(before)
    model = Classifier(build_encoder(finetune_spec(spec)), "ab")
    report = hand_over(weights_of(before), model)
    assert set(report.remapped.values()) == {"copy of the shared table in place of its own"}
    for name in report.remapped:
        assert torch.equal(model.state_dict()[name], before.state_dict()[SHARED])


def test_untold_positions_are_refused() -> None:
    plain = replace(VIT, shared_relative_position=False, absolute_position=False)
    layered = replace(plain, layer_relative_position=True)
    before = weights_of(SimMIM(build_encoder(plain)))
    with pytest.raises(ValueError, match=r"relative_position_bias_table is missing"):
        hand_over(before, SimMIM(build_encoder(layered)))
    before = weights_of(SimMIM(build_encoder(replace(plain, shared_relative_position=True))))
    with pytest.raises(ValueError, match=r"rel_pos_bias\.\S+ has no place in the model"):
        hand_over(before, SimMIM(build_encoder(plain)))


def test_hostile_metadata_changes_nothing() -> None:
    before = weights_of(SimMIM(build_encoder(SWIN)), dropped=7, classes=5)
    report = hand_over(before, Classifier(build_encoder(SWIN), "abcde"))
    assert report.new == ["head.bias", "head.weight"]
    assert "7" not in report.unused


def test_a_swinv2_keeps_the_windows_it_was_trained_with() -> None:
    values = {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2)}
    pretrained = spec_from_dict(
        {"arch": "swinv2", "image_size": (40, 40), "window_size": 10, **values}
    )
    spec = spec_from_dict({"arch": "swinv2", "image_size": (64, 64), "window_size": 8, **values})
    wanted = finetune_spec(spec, pretrained)
    # the last stage of 5 × 5 tokens had one window of 5
    assert wanted == replace(spec, pretrained_window_sizes=(10, 5))  # type: ignore[call-arg]
    # windows are kept once more when a fine-tuned model is fine-tuned
    assert finetune_spec(spec, wanted) == wanted
    before = SimMIM(build_encoder(pretrained))
    fill(before)
    model = Classifier(build_encoder(wanted), "ab")
    report = hand_over(weights_of(before), model)
    assert not report.remapped
    assert report.new == ["head.bias", "head.weight"]
    assert model.eval()(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_a_classifiers_vit_is_as_published() -> None:
    spec = finetune_spec(replace(VIT, frozen_position=True, final_norm=True))
    assert spec == replace(
        VIT,
        frozen_position=False,
        final_norm=False,
        shared_relative_position=False,
        layer_relative_position=True,
    )
    plain = replace(VIT, shared_relative_position=False, layer_relative_position=False)
    assert not finetune_spec(plain).layer_relative_position  # type: ignore[union-attr]
    assert finetune_spec(SWIN, SWIN) == SWIN


def test_a_layer_scale_of_one_model_alone_is_a_difference() -> None:
    plain = replace(VIT, layer_scale=None)
    scaled = weights_of(SimMIM(build_encoder(replace(VIT, layer_scale=0.1))))
    with pytest.raises(ValueError, match=r"layer_scale 0\.1 ≠ None"):
        hand_over(scaled, SimMIM(build_encoder(plain)))
    # where both have one, its initial value does not matter
    other = SimMIM(build_encoder(replace(VIT, layer_scale=1e-5)))
    hand_over(scaled, other)
    assert other.encoder.blocks[0].gamma_1.unique().tolist() == [pytest.approx(0.1)]


def test_what_only_training_uses_may_differ() -> None:
    before = weights_of(SimMIM(build_encoder(SWIN)))
    report = hand_over(before, Classifier(build_encoder(replace(SWIN, drop_path=0.5)), "ab"))
    assert not report.remapped
    with pytest.raises(ValueError, match=r"mlp_ratio 4\.0 ≠ 2\.0"):
        hand_over(before, Classifier(build_encoder(replace(SWIN, mlp_ratio=2.0)), "ab"))


def test_a_head_without_names_is_kept_where_its_size_fits() -> None:
    before = Classifier(build_encoder(SWIN), "abc")
    fill(before)
    weights = weights_of(before)
    same, fewer = Classifier(build_encoder(SWIN), "xyz"), Classifier(build_encoder(SWIN), "xy")
    assert not hand_over(weights, same).new
    assert torch.equal(same.head.weight, before.head.weight)
    assert hand_over(weights, fewer).new == ["head.bias", "head.weight"]


def test_a_new_head_is_as_it_was_drawn() -> None:
    before = SimMIM(build_encoder(VIT))
    model = Classifier(build_encoder(finetune_spec(VIT)), "ab")
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = hand_over(weights_of(before), model)
    for name in report.new:
        assert torch.equal(model.state_dict()[name], drawn[name]), name
    # as published: a ViT's head begins a thousand times smaller
    assert 0 < model.head.weight.abs().max() <= 0.02 * 0.001
    weight = Classifier(build_encoder(SWIN), "ab").head.weight
    assert 0.01 < float(weight.detach().std()) < 0.03


def test_every_weight_is_told_of_and_dropped_ones_too() -> None:
    weights = weights_of(SimMIM(build_encoder(SWIN)), dropped=["head.queue", "teacher.x"])
    larger = replace(SWIN, image_size=(96, 96), window_size=12)
    report = hand_over(weights, Classifier(build_encoder(larger), "ab"))
    decoder = [name for name in weights.state if name.startswith("decoder.")]
    mask_token = "encoder.mask_token"
    assert report.unused == [mask_token, *decoder, "head.queue", "teacher.x"]
    counts = len(report.loaded), len(report.remapped), len(report.new), len(report.unused)
    assert report.summary() == (
        "weights of x.safetensors: {} loaded, {} remapped, {} new, {} unused".format(*counts)
    )
    assert report.lines()[1:] == [
        *(f"new       {name}" for name in report.new),
        *(f"unused    {name}" for name in report.unused),
        *(f"remapped  {name}: window 6×6 → 12×12" for name in report.remapped),
        *(f"loaded    {name}" for name in report.loaded),
    ]


def test_heads_of_another_method_are_left_out_but_not_its_encoders_weights() -> None:
    weights = weights_of(SimMIM(build_encoder(SWIN)))
    foreign = replace(
        weights, kind="simsiam", state=weights.state | {"projector.0": torch.zeros(2)}
    )
    assert "projector.0" in hand_over(foreign, Classifier(build_encoder(SWIN), "ab")).unused
    for kind in ("simmim", "classifier", "encoder"):
        with pytest.raises(ValueError, match=r"projector\.0 has no place in the model"):
            hand_over(replace(foreign, kind=kind), Classifier(build_encoder(SWIN), "ab"))
    foreign.state["encoder.more"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"encoder\.more has no place in the model"):
        hand_over(foreign, Classifier(build_encoder(SWIN), "ab"))


def test_a_weight_of_another_shape_is_refused() -> None:
    weights = weights_of(SimMIM(build_encoder(SWIN)))
    weights.state["encoder.norm.weight"] = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"encoder\.norm\.weight is \(3,\), the model's is \(16,\)"
    ):
        hand_over(weights, Classifier(build_encoder(SWIN), "ab"))


def test_resized_positions_keep_their_type() -> None:
    positions = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0)).half()
    moved = resize_positions(positions, (4, 4), (6, 6))
    assert moved.dtype == torch.float16
    assert torch.equal(moved, resize_positions(positions.float(), (4, 4), (6, 6)).half())
