"""Configurations of transformers: every field of an architecture, there and back."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from layout_cases import PLAIN_VIT, SWIN, TUNED_VIT, VIT
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.weights.hf_config import hints_of_config, model_config, model_type, preprocessor

V2 = SwinV2Spec((32, 32), embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2), window_size=4)


def test_a_swin_s_fields_arrive() -> None:
    spec = replace(SWIN, channels=2, mlp_ratio=1.5, qkv_bias=False, drop_path=0.2)
    config = model_config(spec, "swin", "simmim", {}, {})
    wanted = {
        "architectures": ["SwinForMaskedImageModeling"],
        "model_type": "swin",
        "image_size": 32,
        "patch_size": 4,
        "num_channels": 2,
        "encoder_stride": 16,
        "embed_dim": 8,
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 2],
        "window_size": 2,
        "mlp_ratio": 1.5,
        "qkv_bias": False,
        "drop_path_rate": 0.2,
        "hidden_size": 32,
    }
    assert {key: config[key] for key in wanted} == wanted
    tall = model_config(replace(spec, image_size=(32, 64)), "swin", "encoder", {}, {})
    assert (tall["image_size"], tall["architectures"]) == ([32, 64], ["SwinModel"])


def test_a_vit_s_fields_arrive() -> None:
    spec = replace(VIT, layer_scale=0.3, norm_eps=1e-3, mlp_ratio=1.5, drop_path=0.2)
    token = {"encoder.mask_token": torch.zeros(1)}
    config = model_config(spec, "beit", "encoder", token, {})
    wanted = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 18,
        "layer_norm_eps": 1e-3,
        "use_mask_token": True,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        "use_mean_pooling": False,
        "layer_scale_init_value": 0.3,
        "drop_path_rate": 0.2,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert not model_config(spec, "beit", "encoder", {}, {})["use_mask_token"]
    assert model_config(replace(PLAIN_VIT, qkv_bias=False), "vit", "simmim", {}, {})[
        "qkv_bias"
    ] is (False)


def test_classes_have_their_names_or_numbers() -> None:
    state = {"head.weight": torch.zeros(2, 32)}
    named = model_config(SWIN, "swin", "classifier", state, {"classes": ["ape", "bee"]})
    assert named["id2label"] == {"0": "ape", "1": "bee"}
    assert named["label2id"] == {"ape": 0, "bee": 1}
    assert model_config(SWIN, "swin", "classifier", state, {})["id2label"] == {"0": "0", "1": "1"}


def test_hints_are_what_shapes_do_not_tell() -> None:
    config = {"image_size": 64, "num_attention_heads": 3, "layer_norm_eps": 1e-3}
    assert hints_of_config("vit.", config) == {
        "image_size": (64, 64),
        "num_heads": 3,
        "norm_eps": 1e-3,
    }
    assert hints_of_config("vit.", {"image_size": [32, 64]})["image_size"] == (32, 64)
    assert hints_of_config("beit.", {"image_size": 64})["norm_eps"] == 1e-12
    windows = {"window_size": 4, "pretrained_window_sizes": [2, 2]}
    assert hints_of_config("swinv2.", {"image_size": 8, **windows}) == {
        "image_size": (8, 8),
        **windows,
    }
    assert hints_of_config("swin.", {}) == {}


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("vit.", {"hidden_act": "relu"}, "hidden_act is relu; ours is gelu"),
        ("swin.", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06; ours is 1e-5"),
    ],
)
def test_models_that_compute_something_else_are_refused(
    model: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hints_of_config(model, config)


def test_families_are_told_by_what_they_compute() -> None:
    assert model_type(SWIN, "simmim") == "swin"
    assert model_type(V2, "simmim") == "swinv2"
    assert model_type(PLAIN_VIT, "simmim") == "vit"
    assert model_type(VIT, "encoder") == "beit"
    assert model_type(TUNED_VIT, "classifier") == "beit"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(PLAIN_VIT, qk_scale=0.3), "no factor of q·k"),
        (replace(VIT, qkv_bias=False), "always has biases of q and v"),
        (TUNED_VIT, "end in a norm"),
        (replace(SWIN, absolute_position=True), "cannot add absolute positions"),
        (replace(SWIN, patch_norm=False), "always has a norm after the patch embedding"),
        (replace(SWIN, qk_scale=0.3), "no factor of q·k"),
        (replace(SWIN, window_size=4), r"windows of \[2, 4\] tokens"),
        (replace(V2, image_size=(32, 64)), "shrinks windows by side"),
        (ResNetSpec(), "no Hugging Face model of a resnet"),
    ],
)
def test_what_no_model_of_theirs_computes_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_type(spec, "encoder")


def test_images_are_prepared_as_the_model_was_trained() -> None:
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    found = preprocessor(replace(SWIN, image_size=(32, 64)), given)
    assert (found["image_mean"], found["image_std"]) == (given["mean"], given["std"])
    assert found["size"] == {"height": 32, "width": 64}
    assert preprocessor(SWIN, {})["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
