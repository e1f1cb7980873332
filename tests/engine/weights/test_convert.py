"""Checkpoints in other programs' layouts: published numbers, proofs, bitwise round trips."""

import itertools
import json
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from numerics import assert_close_to, load_golden, load_golden_json, with_prefix
from simmim.backbone.build import Spec, build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec, log_offsets
from simmim.backbone.vit import ViTSpec
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.weights import hf, official
from simmim.weights import proof as proving
from simmim.weights.export import Export, to_layout, write
from simmim.weights.layouts import LAYOUTS
from simmim.weights.load import Weights, load_model, read_model
from simmim.weights.proof import prove

SWIN = SwinSpec(
    image_size=(32, 32), embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2), window_size=2
)
PLAIN_VIT = ViTSpec(
    image_size=(32, 32),
    patch_size=8,
    embed_dim=12,
    depth=2,
    num_heads=2,
    absolute_position=True,
    shared_relative_position=False,
    layer_scale=None,
)
VIT = replace(PLAIN_VIT, absolute_position=False, shared_relative_position=True, layer_scale=0.1)
TUNED_VIT = replace(
    VIT, shared_relative_position=False, layer_relative_position=True, final_norm=False
)
SPECS: dict[str, Spec] = {
    "swin": SWIN,
    "vit": VIT,
    "plain-vit": PLAIN_VIT,
    "tuned-vit": TUNED_VIT,
    "swinv2": SwinV2Spec(
        image_size=(32, 32), embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2), window_size=2
    ),
    "swinv2-from-w3": SwinV2Spec(
        image_size=(64, 64),  # its last stage is smaller than a window
        embed_dim=8,
        depths=(2, 1, 1),
        num_heads=(1, 2, 2),
        window_size=8,
        pretrained_window_sizes=(3, 3, 3),
    ),
    "plain-tuned-vit": replace(PLAIN_VIT, final_norm=False, layer_scale=0.1, qkv_bias=False),
}

# What a layout has no model for, as the message says.
REFUSED = {
    ("mmpretrain", "vit"): "Swin alone",
    ("mmpretrain", "plain-vit"): "Swin alone",
    ("mmpretrain", "tuned-vit"): "Swin alone",
    ("mmpretrain", "plain-tuned-vit"): "Swin alone",
    ("mmpretrain", "swinv2"): "Swin alone",
    ("mmpretrain", "swinv2-from-w3"): "Swin alone",
    ("hf", "plain-tuned-vit"): "end in a norm|biases of q and v",
}
REFUSED |= {("torchvision", name): "ConvNets alone" for name in SPECS}
REFUSED_PRETRAINED = {
    ("hf", "tuned-vit"): "end in a norm",
    ("timm", "tuned-vit"): "ends in a norm",
}
REFUSED_CLASSIFIERS = {
    ("hf", "vit"): "class token",
    ("hf", "plain-vit"): "class token",
    ("official", "vit"): "mean of normalised tokens",
    ("official", "plain-vit"): "mean of normalised tokens",
}
LIBRARIES = {"hf": "transformers", "timm": "timm", "mmpretrain": "mmpretrain"}


def is_here(library: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_module(library)
        except Exception:
            return False
    return True


def make_weights(name: str, kind: str) -> Weights:
    torch.manual_seed(len(name) + len(kind))
    encoder = build_encoder(SPECS[name])
    if kind == "classifier":
        model: ImageModel = Classifier(encoder, ["cat", "dog", "emu"])
    else:
        model = SimMIM(encoder)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if kind == "encoder":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.")}
    metadata = {"classes": ["cat", "dog", "emu"]} if kind == "classifier" else {}
    return Weights("x", "simmim", kind, state, SPECS[name], metadata)


KINDS = ["simmim", "classifier", "encoder"]


def reason_against(layout: str, name: str, kind: str) -> str | None:
    refused = REFUSED | (REFUSED_CLASSIFIERS if kind == "classifier" else REFUSED_PRETRAINED)
    return refused.get((layout, name))


ALL = list(itertools.product(LAYOUTS, SPECS, KINDS))
CASES = [case for case in ALL if reason_against(*case) is None]


@pytest.mark.parametrize(("layout", "name", "kind"), [case for case in ALL if case not in CASES])
def test_what_no_model_computes_is_refused(layout: str, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=reason_against(layout, name, kind)):
        to_layout(make_weights(name, kind), layout)


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


@pytest.mark.parametrize(("layout", "name", "kind"), CASES)
def test_files_come_back_bit_for_bit(layout: str, name: str, kind: str, tmp_path: Path) -> None:
    weights = make_weights(name, kind)
    export = to_layout(weights, layout)
    path = tmp_path / ("out" if layout == "hf" else "out.safetensors")
    write(export, path, weights.metadata)
    back = read_model(path)
    assert_same(weights, back, export)
    assert back.spec == weights.spec
    assert back.layout == layout or (layout, back.layout) == ("official", "simmim")
    if back.kind == "classifier":
        assert list(back.metadata["classes"]) == ["cat", "dog", "emu"]
    # and once more
    again = to_layout(back, layout)
    assert again.state.keys() == export.state.keys()
    assert all(torch.equal(again.state[key], export.state[key]) for key in export.state)


@pytest.mark.parametrize(("layout", "name", "kind"), CASES)
def test_bare_tensors_come_back_bit_for_bit(
    layout: str, name: str, kind: str, tmp_path: Path
) -> None:
    weights = make_weights(name, kind)
    export = to_layout(weights, layout)
    if layout == "hf":
        write(export, tmp_path / "hf", weights.metadata)
        save_file(export.state, tmp_path / "hf" / "model.safetensors")  # no metadata of ours
        back = read_model(tmp_path / "hf")
        assert differing_fields(weights.spec, back.spec) <= {"layer_scale"}
    else:
        write(export, tmp_path / "out.pth", weights.metadata)
        window = getattr(SPECS[name], "window_size", None)
        size = SPECS[name].image_size
        back = read_model(tmp_path / "out.pth", size, num_heads=2, window_size=window)
    if (layout, kind) == ("timm", "classifier") and name in ("vit", "plain-vit"):
        # nothing tells that the tokens are averaged: theirs may read the class token
        assert back.kind == "encoder"
        assert back.metadata["dropped"] == ["head.weight", "head.bias"]
        return
    assert_same(weights, back, export)


def differing_fields(first: Spec, second: Spec) -> set[str]:
    return {key for key, value in vars(first).items() if vars(second)[key] != value}


def assert_same(weights: Weights, back: Weights, export: Export) -> None:
    assert set(weights.state) - set(back.state) == set(export.left_out)
    assert back.kind == export.kind
    for key, tensor in back.state.items():
        assert torch.equal(tensor, weights.state[key]), key


@pytest.mark.parametrize("name", ["hf-swin-mim", "hf-vit-mim", "hf-swinv2-mim"])
def test_models_of_transformers_give_their_published_numbers(name: str, tmp_path: Path) -> None:
    entry, tensors = load_golden(name)
    state = with_prefix(tensors, "weights/")
    for column, folder in (("on_disk", "disk"), ("in_memory", "memory")):
        names = {p["on_disk"]: p[column] for p in load_golden_json(entry_map(name))["pairs"]}
        (tmp_path / folder).mkdir()
        renamed = {names.get(key, key): tensor for key, tensor in state.items()}
        save_file(renamed, tmp_path / folder / "model.safetensors")
        config = {"model_type": entry["config"]["arch"], **entry["config"]}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        model = load_model(tmp_path / folder)
        assert isinstance(model, SimMIM)
        image, mask = tensors["input/image"], tensors["input/bool_masked_pos"]
        grid = model.encoder.spec.grid
        mask = mask.view(-1, *grid).bool()
        tolerance = entry["tolerance"]
        found = model.reconstruct(image, mask)
        assert_close_to(found, tensors["expect/reconstruction"], tolerance["forward"], "pixels")
        assert_close_to(model(image, mask), tensors["expect/loss"], tolerance["loss"], "loss")


def entry_map(name: str) -> str:
    return f"keymap-{name.removesuffix('-mim')}"


@pytest.mark.parametrize("column", ["on_disk", "in_memory"])
@pytest.mark.parametrize("name", ["hf-swin-mim", "hf-vit-mim", "hf-swinv2-mim"])
def test_names_of_transformers_are_those_of_the_map(name: str, column: str) -> None:
    pairs = load_golden_json(entry_map(name))["pairs"]
    state = with_prefix(load_golden(name)[1], "weights/")
    renamed = {pair[column]: state[pair["on_disk"]] for pair in pairs}
    ours, _, _ = hf.to_ours(renamed, {})
    wanted = {pair["official"] for pair in pairs}
    assert ours.keys() == {name for name in wanted if name is not None}


@pytest.mark.parametrize("name", ["hf-swin-mim", "hf-vit-mim", "hf-swinv2-mim"])
def test_names_for_transformers_are_those_of_the_map(name: str) -> None:
    entry, tensors = load_golden(name)
    state = with_prefix(tensors, "weights/")
    size = entry["image_size"]
    config = entry["config"]
    weights = read_model(
        state,
        size,
        num_heads=config.get("num_attention_heads"),
        window_size=config.get("window_size"),
    )
    found = to_layout(weights, "hf").state
    buffers = ("relative_position_index", "relative_coords_table")
    assert found.keys() == {key for key in state if not key.endswith(buffers)}
    for key, tensor in found.items():
        if not key.endswith("attention.key.bias"):  # without effect, so we have none
            assert torch.equal(tensor, state[key]), key


def test_mmpretrain_gives_its_published_numbers() -> None:
    entry, tensors = load_golden("mmpretrain-simmim-swin-w4")
    state = with_prefix(tensors, "weights/")
    model = load_model(state, entry["image_size"])
    assert isinstance(model, SimMIM)
    image, mask = tensors["input/image"], tensors["input/mask"].bool()
    found = model.reconstruct(image, mask)
    tolerance = entry["tolerance"]
    assert_close_to(found, tensors["expect/reconstruction"], tolerance["forward"], "pixels")
    assert_close_to(model(image, mask), tensors["expect/loss"], tolerance["loss"], "loss")
    # and back: every tensor, in their order of merged channels, their buffer included
    weights = read_model(state, entry["image_size"])
    export = to_layout(weights, "mmpretrain")
    prove(weights, export)
    assert export.state.keys() == {k for k in state if not k.endswith("attn_mask")}
    for key, tensor in export.state.items():
        assert torch.equal(tensor, state[key]), key
    names = {p["official"]: p["mmpretrain"] for p in load_golden_json(MMPRETRAIN_MAP)["pairs"]}
    for key in weights.state:
        # the map is of four stages, these numbers of three: their final norm is named by the last
        assert names[key].replace("backbone.norm3", "backbone.norm2") in export.state


MMPRETRAIN_MAP = "keymap-mmpretrain-swin"


def test_a_forgotten_permutation_would_show() -> None:
    # shapes alone do not tell: the order of merged channels must change the numbers
    _, tensors = load_golden("mmpretrain-simmim-swin-w4")
    weights = read_model(with_prefix(tensors, "weights/"), 64)
    merge = "encoder.layers.0.downsample.reduction.weight"
    theirs = with_prefix(tensors, "weights/")["backbone.stages.0.downsample.reduction.weight"]
    assert theirs.shape == weights.state[merge].shape
    assert not torch.equal(theirs, weights.state[merge])


def test_clamped_windows_are_refused_where_the_other_side_has_none() -> None:
    spec = replace(
        SWIN, image_size=(64, 64), window_size=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )
    model = SimMIM(build_encoder(spec))
    weights = Weights("x", "simmim", "simmim", dict(model.state_dict()), spec, {})
    with pytest.raises(ValueError, match="one window for all stages, 4"):
        to_layout(weights, "hf")
    export = to_layout(weights, "mmpretrain")
    stages = export.config["backbone"]["stage_cfgs"]
    assert [stage["window_size"] for stage in stages] == [4, 4, 4, 2]
    prove(weights, export)
    prove(weights, to_layout(weights, "timm"))


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
    monkeypatch.setattr(proving, "_missing", lambda library: "No module")
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


def test_plain_vits_of_timm_are_read_as_encoders(tmp_path: Path) -> None:
    ours = make_weights("plain-vit", "simmim").state
    state: dict[str, Tensor] = {}
    for key, tensor in ours.items():
        name = key.removeprefix("encoder.")
        if name.endswith("attn.q_bias"):
            v = ours[key.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, 0.3 * tensor, v])
        elif not name.endswith("v_bias") and not name.startswith(("decoder", "mask_token")):
            state[name] = tensor
    state["head.weight"], state["head.bias"] = torch.zeros(5, 12), torch.zeros(5)
    weights = read_model(state, num_heads=2)
    assert weights.kind == "encoder"
    assert weights.layout == "timm"
    assert weights.metadata["dropped"] == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match="an encoder without decoder or class head"):
        load_model(state, num_heads=2)
    if is_here("timm"):
        import timm

        model = timm.create_model(
            "vit_base_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=12,
            depth=2,
            num_heads=2,
            num_classes=5,
        ).eval()
        model.load_state_dict(state)
        image = torch.randn(2, 3, 32, 32)
        theirs = model.forward_features(image)[:, 1:].transpose(1, 2).reshape(2, 12, 4, 4)
        from simmim.weights.load import load_encoder

        save_file(state, tmp_path / "vit.safetensors")
        mine = load_encoder(state, num_heads=2).encode(image)
        assert torch.allclose(mine, theirs, atol=1e-5)


PUBLISHED_CLASSIFIERS = [
    "handover-swin-w6-to-w7",
    "handover-vit-4x4-to-6x6",
    "handover-swinv2-w3-to-w4",
]


@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_published_classifiers_give_their_logits(name: str, tmp_path: Path) -> None:
    entry, tensors = load_golden(name)
    state = with_prefix(tensors, "expect/state/")
    if "swinv2" in name:  # the buffer that published files have: window 4, trained with 3
        table = log_offsets(4, 3).view(1, 7, 7, 2)
        state |= {
            f"layers.{stage}.blocks.0.attn.relative_coords_table": table for stage in range(3)
        }
    torch.save({"model": state}, tmp_path / "ckpt.pth")
    model = load_model(tmp_path / "ckpt.pth")
    assert isinstance(model, Classifier)
    assert model.classes == tuple(str(number) for number in range(len(state["head.weight"])))
    logits = model(tensors["input/image"])
    assert_close_to(logits, tensors["expect/logits"], entry["tolerance"]["logits"], "logits")
    weights = read_model(tmp_path / "ckpt.pth")
    assert weights.kind == "classifier"
    for layout in ("timm", "hf", *(["mmpretrain"] if "swin-" in name else [])):
        prove(weights, to_layout(weights, layout))
    back = to_layout(weights, "official").state
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.items())
    assert state.keys() - back.keys() == {k for k in state if k.endswith(official.BUFFERS)}


def test_heads_that_read_the_class_token_are_left_out(tmp_path: Path) -> None:
    # a ViT with a norm of its tokens: nothing here computes its logits
    ours = make_weights("vit", "classifier")
    state = {key.removeprefix("encoder."): tensor for key, tensor in ours.state.items()}
    weights = read_model(state)
    assert weights.kind == "encoder"
    assert weights.metadata["dropped"] == ["head.weight", "head.bias"]
    theirs = to_layout(make_weights("vit", "encoder"), "hf")
    head = {"classifier.weight": torch.ones(3, 12), "classifier.bias": torch.ones(3)}
    write(replace(theirs, state=theirs.state | head), tmp_path / "beit", {})
    weights = read_model(tmp_path / "beit")
    assert weights.kind == "encoder"
    assert set(weights.metadata["dropped"]) == set(head)


def test_parts_that_only_transformers_has_are_named(tmp_path: Path) -> None:
    export = to_layout(make_weights("plain-vit", "encoder"), "hf")
    bare = {key.removeprefix("vit."): tensor for key, tensor in export.state.items()}
    bare |= {"pooler.dense.weight": torch.ones(12, 12), "pooler.dense.bias": torch.ones(12)}
    write(export, tmp_path / "vit", {})
    save_file(bare, tmp_path / "vit" / "model.safetensors")
    weights = read_model(tmp_path / "vit")
    assert weights.spec == PLAIN_VIT
    assert set(weights.metadata["dropped"]) == {"vit.pooler.dense.weight", "vit.pooler.dense.bias"}
    with pytest.raises(ValueError, match=r"config\.json is missing beside it"):
        read_model(bare)
    with pytest.raises(ValueError, match=r"weights unknown: vit\.extra"):
        read_model(export.state | {"vit.extra": torch.ones(1)})


def test_timm_folders_of_the_hub(tmp_path: Path) -> None:
    # as timm writes them: its configuration beside bare tensors
    weights = make_weights("plain-vit", "classifier")
    export = to_layout(weights, "timm")
    save_file(export.state, tmp_path / "model.safetensors")
    told = {"architecture": "vit_x", "global_pool": "avg", "model_args": {"num_heads": 2}}
    told["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.4], "std": [1, 1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    back = read_model(tmp_path)
    assert_same(weights, back, export)
    assert back.metadata == {"mean": [0.5, 0.5, 0.4], "std": [1, 1, 2]}
    told["global_pool"] = "token"
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert read_model(tmp_path).kind == "encoder"


def test_norms_of_another_epsilon_are_refused() -> None:
    weights = make_weights("plain-vit", "encoder")
    other = replace(weights, spec=replace(PLAIN_VIT, norm_eps=1e-12))
    with pytest.raises(ValueError, match="timm's norms have an epsilon of 1e-06, these 1e-12"):
        to_layout(other, "timm")
    assert to_layout(other, "hf").config["layer_norm_eps"] == 1e-12
