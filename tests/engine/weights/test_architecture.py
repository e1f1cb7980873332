"""What names, shapes, buffers and metadata tell of an architecture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import simmim
from numerics import load_golden, with_prefix
from simmim import load_model
from simmim.weights.load import read_model
from simmim.weights.our_names import BUFFERS


def same(model: simmim.SimMIM, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_image_size_and_what_shapes_cannot_tell(official: dict[str, Tensor]) -> None:
    buffers = ("attn_mask", "relative_position_index")
    bare = {k: v for k, v in official.items() if not k.endswith(buffers)}
    assert load_model(bare).encoder.spec.image_size == (64, 64)
    wide = load_model(official, image_size=(64, 128))
    assert wide.encoder.spec.grid == (16, 32)
    assert wide.encode(torch.zeros(1, 3, 64, 128)).shape == (1, 48, 2, 4)
    with pytest.raises(ValueError, match="50×50 px is no multiple"):
        load_model(official, image_size=50)
    scaled = load_model(official, qk_scale=0.5)
    assert scaled.encoder.layers[0].blocks[0].attn.scale == 0.5
    clipped = with_prefix(load_golden("simmim-swin-p2-w6-clip")[1], "weights/")
    with pytest.raises(ValueError, match=r"windows \[6, 6, 6, 3\], but images of 96×96"):
        load_model(clipped, image_size=96)


def test_masks_of_shifted_windows_tell_the_size(official: dict[str, Tensor]) -> None:
    # of images of 128 px, on which no stage is one window
    masks = {name: tensor for name, tensor in official.items() if name.endswith("attn_mask")}
    assert masks
    larger = {name: tensor.repeat(4, 1, 1) for name, tensor in masks.items()}
    assert load_model(official | larger).encoder.spec.image_size == (128, 128)
    tuned = {name.removeprefix("encoder."): tensor for name, tensor in official.items()}
    tuned = {name: tensor for name, tensor in tuned.items() if not name.startswith("decoder.")}
    assert read_model(tuned).spec.image_size == (64, 64)
    larger = {name.removeprefix("encoder."): tensor for name, tensor in larger.items()}
    assert read_model(tuned | larger).spec.image_size == (128, 128)


def test_buffers_tell_the_window_of_a_swinv2() -> None:
    state = with_prefix(load_golden("simmim2-swinv2-plain-ape")[1], "weights/")
    assert load_model(state).encoder.spec.window_size == 3
    bare = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}
    with pytest.raises(ValueError, match="cannot tell the window of this SwinV2: say window_size="):
        load_model(bare)
    assert load_model(bare, window_size=6, image_size=48).encoder.spec.window_size == 6
    # as models say whose network was trained with windows of 2 tokens
    offsets = torch.arange(-2, 3.0) * 8
    column = offsets.sign() * (offsets.abs() + 1).log2() / 3
    table = torch.stack(torch.meshgrid(column, column, indexing="ij"), -1)[None]
    tables = {n: table for n in state if n.endswith("relative_coords_table")}
    assert load_model(state | tables).encoder.spec.pretrained_window_sizes == (2, 2, 2)
    assert load_model(state).encoder.spec.pretrained_window_sizes == (0, 0, 0)
    old = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in state.items()}
    assert same(load_model(old), state)


def test_vit_without_tables_needs_its_heads() -> None:
    state = with_prefix(load_golden("simmim-vit-ape-shared-rpb-p8")[1], "weights/")
    plain = {k: v for k, v in state.items() if "rel_pos_bias" not in k}
    with pytest.raises(ValueError, match="say num_heads="):
        load_model(plain)
    model = load_model(plain, num_heads=2)
    assert model.encoder.spec.image_size == (48, 48)
    assert not model.encoder.spec.shared_relative_position


def test_another_size_keeps_what_the_metadata_tells(tmp_path: Path) -> None:
    from simmim.backbone.build import PRESETS, build_encoder
    from simmim.model.weights_file import save_weights

    spec = replace(PRESETS["vit_base_plain"], depth=1, embed_dim=12, num_heads=2, norm_eps=1e-3)
    spec = replace(spec, image_size=(32, 32), absolute_position=False)
    save_weights(simmim.SimMIM(build_encoder(spec)), tmp_path / "model.safetensors")
    assert load_model(tmp_path).encoder.spec == spec
    larger = load_model(tmp_path, image_size=(64, 32)).encoder.spec
    assert larger == replace(spec, image_size=(64, 32))
    with pytest.raises(ValueError, match="image_size is a side or"):
        load_model(tmp_path, image_size=(1, 2, 3))
