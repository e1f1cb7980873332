"""Models of mmpretrain: published numbers, and the order of merged channels."""

import torch

from numerics import assert_close_to, load_golden, load_golden_json, with_prefix
from simmim.method.simmim import SimMIM
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
