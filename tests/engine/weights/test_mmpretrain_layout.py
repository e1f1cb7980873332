"""Models of mmpretrain: published numbers, and the order of merged channels."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from layout_cases import SWIN, make_weights
from numerics import assert_close_to, load_golden, load_golden_json, with_prefix
from simmim.method.simmim import SimMIM
from simmim.weights import mmpretrain_layout
from simmim.weights.export import to_layout
from simmim.weights.load import load_model, read_model
from simmim.weights.proof import prove

MMPRETRAIN_MAP = "keymap-mmpretrain-swin"


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


def test_a_forgotten_permutation_would_show() -> None:
    # shapes alone do not tell: the order of merged channels must change the numbers
    _, tensors = load_golden("mmpretrain-simmim-swin-w4")
    weights = read_model(with_prefix(tensors, "weights/"), 64)
    merge = "encoder.layers.0.downsample.reduction.weight"
    theirs = with_prefix(tensors, "weights/")["backbone.stages.0.downsample.reduction.weight"]
    assert theirs.shape == weights.state[merge].shape
    assert not torch.equal(theirs, weights.state[merge])


def test_every_field_arrives_in_the_settings() -> None:
    spec = replace(
        SWIN, qkv_bias=False, mlp_ratio=1.5, drop_path=0.2, channels=2, absolute_position=True
    )
    _, settings = mmpretrain_layout.from_ours({}, spec, "encoder", {})
    block = {"ffn_ratio": 1.5, "attn_cfgs": {"qkv_bias": False}}
    assert settings["backbone"] == {
        "type": "SwinTransformer",
        "arch": {"embed_dims": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 2]},
        "img_size": [32, 32],
        "in_channels": 2,
        "patch_cfg": {"kernel_size": 4, "stride": 4},
        "out_indices": [2],
        "drop_path_rate": 0.2,
        "use_abs_pos_embed": True,
        "stage_cfgs": [{"window_size": 2, "block_cfgs": block}] * 3,
    }


def test_merged_channels_are_in_their_order() -> None:
    weights = make_weights("swin", "simmim")
    name = "downsample.reduction.weight"
    ours = weights.state[f"encoder.layers.0.{name}"]
    theirs = to_layout(weights, "mmpretrain").state[f"backbone.stages.0.{name}"]
    for channel in range(8):
        for row in range(2):
            for column in range(2):
                # channel by channel there; here neighbour by neighbour, rows running first
                found = theirs[:, channel * 4 + 2 * row + column]
                assert torch.equal(found, ours[:, (2 * column + row) * 8 + channel])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("encoder", {"qk_scale": 0.3}, "no qk_scale"),
        ("encoder", {"patch_norm": False}, "has a norm after the patch embedding"),
        ("simmim", {"channels": 1}, "decoder has 3 channels, this one 1"),
    ],
)
def test_what_it_does_not_compute_is_refused(
    kind: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mmpretrain_layout.from_ours({}, replace(SWIN, **change), kind, {})
