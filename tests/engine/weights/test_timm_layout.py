"""Models of timm: plain ViTs, and folders of the Hub."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layout_cases import assert_same, is_here, make_weights
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
