"""Models of timm: plain ViTs, and folders of the Hub."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layout_cases import PLAIN_VIT, SPECS, SWIN, TUNED_VIT, assert_same, is_here, make_weights
from simmim.backbone.vit import ViTSpec
from simmim.weights import timm_layout
from simmim.weights.export import to_layout
from simmim.weights.load import load_model, read_model


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


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_merging_begins_the_next_stage(name: str) -> None:
    weights = make_weights(name, "encoder")
    theirs = to_layout(weights, "timm").state
    for part in ("reduction.weight", "norm.weight", "norm.bias"):
        ours = weights.state[f"encoder.layers.0.downsample.{part}"]
        assert torch.equal(theirs[f"layers.1.downsample.{part}"], ours)
    assert not any(key.startswith("layers.0.downsample") for key in theirs)


def test_a_swin_s_fields_arrive_in_the_arguments() -> None:
    spec = replace(SWIN, image_size=(32, 64), channels=2, mlp_ratio=1.5, drop_path=0.2)
    state = {"head.weight": torch.zeros(5, 32)}
    _, config = timm_layout.from_ours(state, replace(spec, qkv_bias=False), "classifier", {})
    assert config == {
        "architecture": "swin_base_patch4_window7_224",
        "model_args": {
            "img_size": [32, 64],
            "patch_size": 4,
            "in_chans": 2,
            "embed_dim": 8,
            "mlp_ratio": 1.5,
            "qkv_bias": False,
            "num_classes": 5,
            "drop_path_rate": 0.2,
            "depths": [1, 2, 1],
            "num_heads": [1, 2, 2],
            "window_size": 2,
        },
    }
    v2 = SPECS["swinv2-from-w3"]
    arguments = timm_layout.from_ours({}, v2, "encoder", {})[1]["model_args"]
    assert arguments["pretrained_window_sizes"] == [3, 3, 3]
    assert arguments["num_classes"] == 0


def test_a_vit_s_norms_pooling_and_positions_arrive_in_the_arguments() -> None:
    def arguments(spec: ViTSpec, kind: str) -> dict[str, Any]:
        state = {"head.weight": torch.zeros(5, 12)}
        return dict(timm_layout.from_ours(state, spec, kind, {})[1]["model_args"])

    beit = arguments(replace(TUNED_VIT, layer_scale=0.3), "classifier")
    wanted = {
        "depth": 2,
        "num_heads": 2,
        "global_pool": "avg",
        "init_values": 0.3,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "use_shared_rel_pos_bias": False,
        "use_fc_norm": True,
    }
    assert {key: beit[key] for key in wanted} == wanted
    plain = arguments(replace(PLAIN_VIT, final_norm=False, layer_scale=0.3), "classifier")
    assert (plain["fc_norm"], plain["final_norm"], plain["init_values"]) == (True, True, 0.3)
    bare = arguments(PLAIN_VIT, "encoder")
    assert (bare["fc_norm"], bare["final_norm"], bare["global_pool"]) == (False, True, "token")
    with pytest.raises(ValueError, match="no factor of q·k"):
        arguments(replace(PLAIN_VIT, qk_scale=0.3), "encoder")


def test_a_plain_vit_has_one_bias_whose_keys_are_zero() -> None:
    weights = make_weights("plain-vit", "encoder")
    state = to_layout(weights, "timm").state
    q, k, v = state["blocks.1.attn.qkv.bias"].chunk(3)
    assert torch.equal(q, weights.state["encoder.blocks.1.attn.q_bias"])
    assert torch.equal(v, weights.state["encoder.blocks.1.attn.v_bias"])
    assert not k.any()
