"""The ConvNeXt: every field of its architecture reaches the parameters."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from simmim.backbone.convnext import ConvNeXtSpec

SPEC = ConvNeXtSpec(
    (32, 64), channels=2, depths=(1, 2, 1, 1), widths=(4, 6, 8, 10), layer_scale=0.3
)


def test_fields_reach_the_parameters() -> None:
    encoder = SPEC.build()
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    assert shapes["stem.0.weight"] == (4, 2, 4, 4)
    assert shapes["mask_token"] == (1, 4, 1, 1)
    assert shapes["stages.1.downsample.1.weight"] == (6, 4, 2, 2)
    assert shapes["stages.3.blocks.0.mlp.fc1.weight"] == (40, 10)
    assert [len(stage.blocks) for stage in encoder.stages] == [1, 2, 1, 1]
    for block in encoder.blocks_in_order():
        assert block.gamma.unique().tolist() == pytest.approx([0.3])
    assert replace(SPEC, layer_scale=None).build().blocks_in_order()[0].gamma is None
    norms = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
    assert norms == {1e-6}
    assert encoder.num_features == 10


def test_a_block_adds_its_gained_branch() -> None:
    block = SPEC.build().eval().blocks_in_order()[0]
    x = torch.randn(2, 4, 8, 8)
    branch = block.mlp(block.norm(block.conv_dw(x).permute(0, 2, 3, 1))) * 0.3
    torch.testing.assert_close(block(x, None), x + branch.permute(0, 3, 1, 2))
    block.drop_path.rate = 0.5
    block.train()
    for _ in range(4):
        out = block(x, block.drop_path(x))
        kept = (out != x).flatten(1).any(1).view(-1, 1, 1, 1)
        expected = torch.where(kept, x + 2 * branch.permute(0, 3, 1, 2), x)
        torch.testing.assert_close(out, expected)


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    encoder = replace(SPEC, widths=(32, 32, 32, 32)).build()
    weight = encoder.blocks_in_order()[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not encoder.stem[0].bias.any()
    assert 0 < encoder.mask_token.abs().max() < 0.1


@pytest.mark.parametrize("change", [{"depths": (1, 1, 1)}, {"widths": (4, 0, 4, 4)}])
def test_four_stages_are_wanted(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be four numbers, one for each stage"):
        replace(SPEC, **change).build()
