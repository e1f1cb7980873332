"""Checkpoints in other programs' layouts: published numbers, proofs, bitwise round trips."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from numerics import INDEX, assert_close_to, load_golden, load_golden_json, with_prefix
from simmim.backbone.build import Spec, build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.checkpoint import save_weights
from simmim.commands import convert as command
from simmim.convert import proof as proving
from simmim.convert.export import LAYOUTS, to_layout, write
from simmim.convert.proof import prove
from simmim.load import Weights, load_model, read_model
from simmim.method.classifier import Classifier
from simmim.method.simmim import SimMIM

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
SPECS: dict[str, Spec] = {"swin": SWIN, "vit": VIT, "plain-vit": PLAIN_VIT, "tuned-vit": TUNED_VIT}
try:
    from simmim.backbone.swinv2 import SwinV2Spec

    SPECS["swinv2"] = SwinV2Spec(
        image_size=(32, 32), embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2), window_size=2
    )
except ImportError:
    pass

# What a layout has no model for, as the message says.
REFUSED = {
    ("mmpretrain", "vit"): "Swin alone",
    ("mmpretrain", "plain-vit"): "Swin alone",
    ("mmpretrain", "tuned-vit"): "Swin alone",
    ("mmpretrain", "swinv2"): "Swin alone",
}
REFUSED_PRETRAINED = {
    ("hf", "tuned-vit"): "end in a norm",
    ("timm", "tuned-vit"): "ends in a norm",
}
REFUSED_CLASSIFIERS = {
    ("hf", "vit"): "class token",
    ("hf", "plain-vit"): "class token",
    ("timm", "vit"): "mean of normalised tokens",
    ("timm", "plain-vit"): "mean of normalised tokens",
}


def is_here(library: str) -> bool:
    try:
        import_module(library)
    except Exception:
        return False
    return True


def make_weights(name: str, kind: str) -> Weights:
    torch.manual_seed(len(name) + len(kind))
    encoder = build_encoder(SPECS[name])
    model = SimMIM(encoder) if kind == "simmim" else Classifier(encoder, ["cat", "dog", "emu"])
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    metadata = {} if kind == "simmim" else {"classes": ["cat", "dog", "emu"]}
    return Weights("x", "simmim", kind, state, SPECS[name], metadata)


@pytest.mark.parametrize("kind", ["simmim", "classifier"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_proves_itself_and_comes_back(
    layout: str, name: str, kind: str, tmp_path: Path
) -> None:
    weights = make_weights(name, kind)
    refused = REFUSED | (REFUSED_CLASSIFIERS if kind == "classifier" else REFUSED_PRETRAINED)
    if (layout, name) in refused:
        with pytest.raises(ValueError, match=refused[layout, name]):
            to_layout(weights, layout)
        return
    export = to_layout(weights, layout)
    found = prove(weights, export)
    library = {"hf": "transformers", "timm": "timm"}.get(layout, "")
    if library and is_here(library):
        assert found.difference is not None
        assert found.difference < 1e-5
    else:
        assert found.difference is None
    path = tmp_path / ("out" if layout == "hf" else "out.safetensors")
    write(export, path, weights.metadata)
    back = read_model(path, SPECS[name].image_size, num_heads=2)
    assert set(weights.state) - set(back.state) == set(export.left_out)
    for key, tensor in back.state.items():
        assert torch.equal(tensor, weights.state[key]), key
    differ = {
        key: (a, b)
        for (key, a), b in zip(vars(weights.spec).items(), vars(back.spec).values())
        if a != b
    }
    # without configuration or metadata shapes tell all but these
    assert differ.keys() <= {"layer_scale", "window_size"} if layout != "simmim" else not differ
    if kind == "classifier" and layout in ("simmim", "hf"):
        assert list(back.metadata["classes"]) == ["cat", "dog", "emu"]
    # and on from there: our weights again, bit for bit
    again = to_layout(back, "simmim").state
    assert again.keys() == back.state.keys()
    if not export.left_out:
        assert torch.equal(
            *(torch.cat([s[k].flatten() for k in sorted(s)]) for s in (again, weights.state))
        )


@pytest.mark.parametrize("name", ["hf-swin-mim", "hf-vit-mim", "hf-swinv2-mim"])
def test_models_of_transformers_give_their_published_numbers(name: str, tmp_path: Path) -> None:
    entry, tensors = load_golden(name)
    if "swinv2" in name and "swinv2" not in SPECS:
        pytest.skip("no SwinV2 here yet")
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


@pytest.mark.parametrize("name", ["hf-swin-mim", "hf-vit-mim", "hf-swinv2-mim"])
def test_names_for_transformers_are_those_of_the_map(name: str) -> None:
    if "swinv2" in name and "swinv2" not in SPECS:
        pytest.skip("no SwinV2 here yet")
    entry, tensors = load_golden(name)
    state = with_prefix(tensors, "weights/")
    size = entry["image_size"]
    heads = entry["config"].get("num_attention_heads")
    weights = read_model(state, size, num_heads=heads)
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
    assert to_layout(weights, "mmpretrain").config["window_size"] == [4, 4, 4, 2]
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
        from simmim.load import load_encoder

        save_file(state, tmp_path / "vit.safetensors")
        mine = load_encoder(state, num_heads=2).encode(image)
        assert torch.allclose(mine, theirs, atol=1e-5)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = command.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weights = make_weights("swin", "simmim")
    model = SimMIM(build_encoder(SWIN))
    model.load_state_dict(weights.state)
    save_weights(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = run(capsys, checkpoint, tmp_path / "hf", "--to", "hf")
    assert (code, err) == (0, "")
    assert "transformers's model gives the same outputs: largest difference" in out
    assert sorted(os.listdir(tmp_path / "hf")) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    code, out, _ = run(capsys, tmp_path / "hf", tmp_path / "back.safetensors", "--to", "simmim")
    assert code == 0
    first, back = load_file(checkpoint), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys()
    assert all(torch.equal(first[key], back[key]) for key in first)
    code, out, _ = run(capsys, checkpoint, tmp_path / "official.pth", "--to", "official")
    assert code == 0
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert content["model"].keys() == first.keys()
    code, out, _ = run(capsys, checkpoint, tmp_path / "timm.safetensors", "--to", "timm")
    assert (
        "left out, timm has no place: decoder.0.bias, decoder.0.weight, encoder.mask_token" in out
    )


def test_a_folder_of_transformers_is_replaced_whole(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    (target / "precious.txt").write_text("x")
    code, _, err = run(capsys, checkpoint, target, "--to", "hf")
    assert code == 2
    assert "exists; choose another OUT or add --overwrite" in err
    assert (target / "precious.txt").exists()
    assert run(capsys, checkpoint, target, "--to", "hf", "--overwrite")[0] == 0
    assert (target / "config.json").exists()


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.system, ("touch exploded",))


def bad_files(folder: Path, good: Path) -> dict[str, str]:
    """File name → what the message says of it."""
    data = good.read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "text.safetensors").write_text("hello")
    torch.save({"model": Bomb()}, folder / "hostile.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, folder / "other.pth")
    state = load_file(good)
    state["encoder.norm.bias"][3] = float("nan")
    save_file(state, folder / "nan.safetensors")
    return {
        "cut.safetensors": "not a readable safetensors file",
        "text.safetensors": "not a readable safetensors file",
        "hostile.pth": "refused, loading it would run code",
        "other.pth": "unknown layout",
        "nan.safetensors": "encoder.norm.bias holds values that are not finite",
        "missing.safetensors": "no such file",
    }


def test_bad_files_are_one_line_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in bad_files(tmp_path, checkpoint).items():
        for layout, out in (("simmim", "x.safetensors"), ("hf", "x")):
            code, _, err = run(capsys, tmp_path / name, tmp_path / out, "--to", layout)
            assert code == 2
            assert err.count("\n") == 1, err
            assert name in err
            assert words in err
            assert not (tmp_path / out).exists()
    assert not (tmp_path / "exploded").exists()
    for arguments, words in [
        ((checkpoint, tmp_path / "x.bin2", "--to", "timm"), "call it NAME.safetensors"),
        ((checkpoint, tmp_path / "x.safetensors", "--to", "hf"), "writes a folder"),
        ((checkpoint, checkpoint, "--to", "timm"), "exists; choose another OUT"),
    ]:
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert words in err
    with pytest.raises(SystemExit) as stop:
        run(capsys, checkpoint, tmp_path / "x", "--to", "keras")
    assert stop.value.code == 2


def test_a_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("simmim.convert.export.save_file", full)
    code, _, err = run(capsys, checkpoint, tmp_path / "hf", "--to", "hf", "--no-proof")
    assert code == 1
    assert "No space left" in err
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".*"))


def test_every_golden_map_is_used() -> None:
    assert {"hf-swin-mim", "hf-vit-mim", "hf-swinv2-mim", "mmpretrain-simmim-swin-w4"} <= set(INDEX)
