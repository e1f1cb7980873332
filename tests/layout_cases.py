"""Small models of every architecture, and which layouts of other programs have a place for them."""

import itertools
import warnings
from dataclasses import replace
from importlib import import_module

import torch

from simmim.backbone.build import Spec, build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.weights.export import Export
from simmim.weights.layouts import LAYOUTS
from simmim.weights.load import Weights

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


def differing_fields(first: Spec, second: Spec) -> set[str]:
    return {key for key, value in vars(first).items() if vars(second)[key] != value}


def assert_same(weights: Weights, back: Weights, export: Export) -> None:
    assert set(weights.state) - set(back.state) == set(export.left_out)
    assert back.kind == export.kind
    for key, tensor in back.state.items():
        assert torch.equal(tensor, weights.state[key]), key
