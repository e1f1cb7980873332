"""The ViT: every field of its architecture reaches the parameters and the ops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim.backbone import vit
from simmim.backbone.attention import relative_position_bias_with_cls
from simmim.backbone.vit import PRESETS, ViT, ViTSpec

SPEC = ViTSpec((16, 24), patch_size=8, channels=2, embed_dim=16, depth=2, num_heads=2)


def test_fields_reach_the_parameters() -> None:
    spec = replace(
        SPEC,
        mlp_ratio=1.5,
        qkv_bias=False,
        qk_scale=0.3,
        layer_relative_position=True,
        layer_scale=0.7,
        norm_eps=1e-3,
        absolute_position=True,
    )
    encoder = ViT(spec)
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    assert shapes["patch_embed.proj.weight"] == (16, 2, 8, 8)
    assert shapes["pos_embed"] == (1, 7, 16)
    assert shapes["blocks.0.mlp.fc1.weight"] == (24, 16)
    assert shapes["rel_pos_bias.relative_position_bias_table"] == (3 * 5 + 3, 2)
    assert shapes["blocks.1.attn.relative_position_bias_table"] == (18, 2)
    assert "blocks.0.attn.q_bias" not in shapes
    assert encoder.blocks[0].attn.scale == 0.3
    assert encoder.blocks[0].gamma_1.unique().tolist() == pytest.approx([0.7])
    assert encoder.blocks[0].gamma_2.unique().tolist() == pytest.approx([0.7])
    norms = [module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-3] * 5
    bare = ViT(replace(SPEC, layer_scale=None, final_norm=False, shared_relative_position=False))
    assert isinstance(bare.norm, nn.Identity)
    assert bare.rel_pos_bias is bare.blocks[0].gamma_1 is bare.blocks[0].gamma_2 is None
    assert ViT(replace(SPEC, class_token=False, shared_relative_position=False)).cls_token is None


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    encoder = ViT(replace(SPEC, embed_dim=64, depth=3, absolute_position=True))
    first, third = (encoder.blocks[i].mlp.fc2.weight for i in (0, 2))
    assert (first.std() / third.std()).item() == pytest.approx(3**0.5, rel=0.03)
    assert encoder.blocks[0].attn.proj.weight.abs().max() <= 0.02 / 2**0.5 * (1 + 1e-6)
    for parameter in (encoder.mask_token, encoder.cls_token, encoder.pos_embed):
        assert 0.015 < parameter.abs().max() <= 0.02
    assert not encoder.patch_embed.proj.bias.any()


def test_frozen_positions_are_a_table_that_does_not_train() -> None:
    frozen = ViT(replace(SPEC, absolute_position=True, frozen_position=True)).pos_embed
    assert not frozen.requires_grad
    assert torch.equal(frozen.data, vit.sine_cosine_positions((2, 3), 16, 1))
    assert ViT(replace(SPEC, absolute_position=True)).pos_embed.requires_grad


def test_attention_has_the_scale_the_biases_and_the_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def noted(x: Tensor, *given: Any, **options: Any) -> Tensor:
        seen.append((given, options))
        return x

    monkeypatch.setattr(vit, "residual_attention", noted)
    encoder = ViT(replace(SPEC, qk_scale=0.3, layer_relative_position=True, norm_eps=1e-3)).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith(("_bias", "bias_table")):
            nn.init.normal_(parameter)
    encoder(torch.zeros(1, 2, 16, 24))
    given, options = seen[1]
    block = encoder.blocks[1]
    q, k, v = given[3].chunk(3)
    assert torch.equal(q, block.attn.q_bias)
    assert torch.equal(v, block.attn.v_bias)
    assert not k.any()
    own = relative_position_bias_with_cls(block.attn.relative_position_bias_table, (2, 3))
    assert torch.equal(given[4], own + encoder.rel_pos_bias())
    assert options["gamma"] is block.gamma_1
    assert (options["num_heads"], options["window"], options["scale"]) == (2, (1, 7), 0.3)
    assert options["eps"] == 1e-3


def test_both_branches_of_a_block_are_dropped_by_draws_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors: list[Tensor | None] = []

    def noted(x: Tensor, *given: Any, branch_scale: Tensor | None = None, **options: Any) -> Tensor:
        factors.append(branch_scale)
        return x

    monkeypatch.setattr(vit, "residual_attention", noted)
    monkeypatch.setattr("simmim.backbone.layers.residual_mlp", noted)
    torch.manual_seed(0)
    ViT(replace(SPEC, drop_path=0.5)).train()(torch.zeros(16, 2, 16, 24))
    assert factors[:2] == [None, None]  # the first block drops nothing
    attention, mlp = factors[2:]
    assert attention is not None
    assert mlp is not None
    assert not torch.equal(attention, mlp)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide the width 16"),
        ({"class_token": False}, "class_token: relative position tables"),
        ({"frozen_position": True}, "frozen_position: there is no absolute position"),
        ({"image_size": (20, 24)}, "image_size: 20×24 px .* nearest is 16×24"),
        ({"embed_dim": 18, "frozen_position": True, "absolute_position": True}, "width of 4·n"),
    ],
)
def test_fields_that_do_not_fit_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(replace(SPEC, **change))


def test_presets_have_their_published_widths_depths_and_heads() -> None:
    found = {n: (s.embed_dim, s.depth, s.num_heads) for n, s in PRESETS.items()}
    wanted = {
        "vit_tiny": (192, 12, 3),
        "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12),
        "vit_large": (1024, 24, 16),
    }
    assert found == wanted | {f"{name}_plain": value for name, value in wanted.items()}
    plain = PRESETS["vit_base_plain"]
    assert (plain.absolute_position, plain.shared_relative_position) == (True, False)
    assert plain.layer_scale is None
