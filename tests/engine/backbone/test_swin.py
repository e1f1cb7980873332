"""Swin: sizes that do not fit, and every field of its architecture in parameters and ops."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from simmim.backbone import swin
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import PRESETS, SwinSpec

SWIN = SwinSpec(image_size=(32, 64), embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (36, 64)}, r"image_size: 36×64 px is no multiple .* nearest is 32×64"),
        ({"window_size": 3}, "window of 3 tokens does not fit .* nearest that fits is 2"),
        ({"num_heads": (3, 4)}, "num_heads: 3 does not divide the width 8 of stage 0"),
        ({"num_heads": (2,)}, "1 values for 2 stages"),
    ],
)
def test_swin_that_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(replace(SWIN, **change))


def test_windows_shrink_to_a_small_map_and_odd_blocks_shift_by_half() -> None:
    spec = SwinSpec((48, 48), embed_dim=8, depths=(2, 2, 2), num_heads=(1, 1, 1), window_size=6)
    assert [spec.resolution(stage) for stage in range(3)] == [(12, 12), (6, 6), (3, 3)]
    assert [spec.window(stage) for stage in range(3)] == [6, 6, 3]
    assert [[spec.shift(s, b) for b in range(2)] for s in range(3)] == [[0, 3], [0, 0], [0, 0]]
    attention = spec.build().layers[0].blocks[1].attn
    assert (attention.window, attention.shift) == ((6, 6), 3)


def test_fields_reach_the_parameters() -> None:
    spec = replace(
        SWIN, channels=2, mlp_ratio=1.5, qkv_bias=False, absolute_position=True, patch_norm=False
    )
    encoder = spec.build()
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    assert shapes["patch_embed.proj.weight"] == (8, 2, 4, 4)
    assert shapes["absolute_pos_embed"] == (1, 8 * 16, 8)
    assert shapes["layers.1.blocks.0.mlp.fc1.weight"] == (24, 16)
    assert shapes["layers.0.blocks.0.attn.relative_position_bias_table"] == (49, 2)
    assert shapes["layers.1.blocks.0.attn.relative_position_bias_table"] == (49, 4)
    assert shapes["layers.0.downsample.reduction.weight"] == (16, 32)
    assert "layers.0.blocks.0.attn.qkv.bias" not in shapes
    assert not any(name.startswith("patch_embed.norm") for name in shapes)
    norms = [module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-5] * 10
    table = SWIN.build().layers[0].blocks[0].attn.relative_position_bias_table
    assert 0.01 < table.std() < 0.03


def test_ops_have_the_fields_statistics_and_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[dict[str, Any]]] = {}

    def noting(op: str) -> Callable[..., Any]:
        run = getattr(swin, op)

        def noted(*given: Any, **options: Any) -> Any:
            seen.setdefault(op, []).append(options)
            return run(*given, **options)

        return noted

    for op in ("embed_patches", "residual_attention", "merge_patches"):
        monkeypatch.setattr(swin, op, noting(op))
    encoder = replace(SWIN, absolute_position=True, qk_scale=0.3).build().eval()
    mean, std = torch.full((3,), 0.4), torch.full((3,), 0.2)
    image = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    encoder(image, torch.zeros(1, 8, 16, dtype=torch.bool), mean=mean, std=std)
    (embedding,) = seen["embed_patches"]
    assert torch.equal(embedding["pos_embed"], encoder.absolute_pos_embed[0])
    assert (embedding["mean"] is mean, embedding["std"] is std) == (True, True)
    assert embedding["eps"] == 1e-5
    told = [
        (o["num_heads"], o["window"], o["shift"], o["scale"]) for o in seen["residual_attention"]
    ]
    assert told == [
        (2, (4, 4), 0, 0.3),
        (2, (4, 4), 2, 0.3),
        (4, (4, 4), 0, 0.3),
        (4, (4, 4), 0, 0.3),
    ]
    assert seen["merge_patches"][0]["eps"] == 1e-5


def test_presets_have_their_published_sizes() -> None:
    found = {n: (s.embed_dim, s.depths[2], s.num_heads, s.window_size) for n, s in PRESETS.items()}
    assert found == {
        "swin_tiny": (96, 6, (3, 6, 12, 24), 6),
        "swin_small": (96, 18, (3, 6, 12, 24), 6),
        "swin_base": (128, 18, (4, 8, 16, 32), 6),
        "swin_large": (192, 18, (6, 12, 24, 48), 12),
    }
