"""Fine-tuned models as microsoft/SimMIM saves them: logits, and heads that are left out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layout_cases import make_weights
from numerics import assert_close_to, load_golden, with_prefix
from simmim.backbone.swinv2 import log_offsets
from simmim.model.classifier import Classifier
from simmim.weights.export import to_layout, write
from simmim.weights.load import load_model, read_model
from simmim.weights.our_names import BUFFERS
from simmim.weights.proof import prove

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
    assert state.keys() - back.keys() == {k for k in state if k.endswith(BUFFERS)}


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
