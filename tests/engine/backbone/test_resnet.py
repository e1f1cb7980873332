"""The ResNet: every field of its architecture reaches the parameters and the norms' op."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim.backbone import resnet
from simmim.backbone.layers import Backends
from simmim.backbone.resnet import ResNetSpec

SPEC = ResNetSpec((32, 64), depths=(1, 2, 1, 1), bottleneck=False, width=4, channels=2)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_fields_reach_the_parameters(bottleneck: bool) -> None:
    encoder = replace(SPEC, bottleneck=bottleneck).build()
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    assert shapes["conv1.weight"] == (4, 2, 7, 7)
    assert shapes["mask_token"] == (1, 4, 1, 1)
    assert encoder.num_features == 32 * (4 if bottleneck else 1)
    assert [len(encoder.get_submodule(f"layer{i}")) for i in range(1, 5)] == [1, 2, 1, 1]
    assert ("layer1.0.downsample.0.weight" in shapes) == bottleneck
    assert ("layer1.0.conv3.weight" in shapes) == bottleneck
    strides = [b.conv2.stride if bottleneck else b.conv1.stride for b in encoder.blocks_in_order()]
    assert strides == [(1, 1), (2, 2), (1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize("zero", [True, False])
def test_only_the_last_norm_of_a_block_begins_at_zero_if_it_is_to(zero: bool) -> None:
    encoder = replace(SPEC, bottleneck=True, zero_init_residual=zero).build()
    for block in encoder.blocks_in_order():
        assert block.bn3.weight.unique().tolist() == [0.0 if zero else 1.0]
        assert block.bn1.weight.unique().tolist() == block.bn2.weight.unique().tolist() == [1.0]
    assert 0 < encoder.mask_token.abs().max() < 0.1


def test_every_norm_has_the_backend_of_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noted(norm: Any, x: Tensor, *rest: Any, backend: str | None) -> Tensor:
        seen.append(backend)
        return x

    monkeypatch.setattr(resnet, "norm_relu", noted)
    encoder = replace(SPEC, bottleneck=True).build()
    encoder.backends = Backends("reference", "xformers")
    encoder(torch.zeros(1, 2, 32, 64))
    assert seen == ["reference"] * (1 + 3 * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 2, 1)}, "depths: .* must be four numbers"),
        ({"depths": (1, 0, 1, 1)}, "depths: .* must be four numbers"),
        ({"width": 0}, "width: 0 must be at least 1"),
        ({"image_size": (48, 64)}, "image_size: 48×64 px .* nearest is 64×64"),
    ],
)
def test_fields_that_do_not_fit_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change).build()
