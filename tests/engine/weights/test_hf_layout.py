"""Models of transformers: published names and numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layout_cases import PLAIN_VIT, make_weights
from numerics import assert_close_to, load_golden, load_golden_json, with_prefix
from simmim.method.simmim import SimMIM
from simmim.weights import hf_layout
from simmim.weights.export import to_layout, write
from simmim.weights.load import load_model, read_model


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
    ours, _, _ = hf_layout.to_ours(renamed, {})
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


def test_classes_and_statistics_of_the_configuration_are_taken() -> None:
    export = to_layout(make_weights("swin", "classifier"), "hf")
    names = {str(number): f"class {number}" for number in range(11)}
    config = {"id2label": names, "image_mean": [0.1], "image_std": [0.2]}
    metadata = hf_layout.to_ours(export.state, config).metadata
    assert metadata == {
        "classes": [f"class {number}" for number in range(11)],  # in order of their numbers
        "mean": [0.1],
        "std": [0.2],
    }


def test_query_key_and_value_lie_in_this_order() -> None:
    weights = make_weights("swin", "simmim")
    state = to_layout(weights, "hf").state
    stem = "swin.encoder.layers.1.blocks.1.attention.self"
    for kind in ("weight", "bias"):
        parts = [state[f"{stem}.{part}.{kind}"] for part in ("query", "key", "value")]
        assert torch.equal(
            torch.cat(parts), weights.state[f"encoder.layers.1.blocks.1.attn.qkv.{kind}"]
        )
    del state[f"{stem}.key.bias"]
    with pytest.raises(ValueError, match="query, key and value do not come together"):
        hf_layout.to_ours(state, {})
