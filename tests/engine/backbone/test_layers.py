"""Layers that backbones share: stochastic depth, recomputed blocks, initial values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim.backbone import layers
from simmim.backbone.layers import (
    DropPath,
    Mlp,
    check_image,
    drop_path_rates,
    init_linear,
    run_block,
    scale_branch,
)


def test_rates_grow_linearly_from_nothing_to_the_configured_one() -> None:
    assert drop_path_rates(0.4, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_rates(0.4, 1) == [0.0]


def test_branches_are_dropped_at_their_rate_and_the_others_scaled() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    scale = drop(torch.zeros(4000, 2))
    assert scale is not None
    assert scale.shape == (4000,)
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (scale == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drop.eval()(torch.zeros(4, 2)) is None
    assert DropPath(0.0)(torch.zeros(4, 2)) is None


def test_a_branch_is_scaled_image_by_image_in_its_own_type() -> None:
    branch = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    scaled = scale_branch(branch, torch.tensor([0.0, 2.0]))
    assert scaled.dtype == torch.bfloat16
    assert scaled.flatten(1).unique(dim=1).tolist() == [[0.0], [2.0]]
    assert scale_branch(branch, None) is branch


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_is_computed_again_only_where_that_is_wanted(recompute: bool) -> None:
    runs: list[int] = []

    def block(x: Tensor, factor: int) -> Tensor:
        runs.append(factor)
        return (x * factor).exp()

    x = torch.ones(2, requires_grad=True)
    run_block(block, recompute, x, 3).sum().backward()
    assert runs == [3] * (2 if recompute else 1)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * torch.full((2,), 3.0).exp())


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 8, 16), (3, 8, 16), (1, 3, 16, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    check_image(torch.zeros(1, 3, 8, 16), 3, (8, 16))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 8, 16\]"):
        check_image(torch.zeros(shape), 3, (8, 16))


def test_linear_layers_start_as_published() -> None:
    torch.manual_seed(0)
    linear, cut, norm = nn.Linear(200, 100), nn.Linear(200, 100), nn.LayerNorm(4)
    nn.init.constant_(norm.weight, 3.0)
    nn.init.constant_(norm.bias, 3.0)
    init_linear(linear)
    init_linear(cut, bound=0.02)
    init_linear(norm)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert linear.weight.abs().max() > 0.06
    assert cut.weight.abs().max() <= 0.02
    assert not linear.bias.any()
    assert norm.weight.tolist() == [1.0] * 4
    assert not norm.bias.any()


def test_an_mlp_hands_on_its_gain_factor_epsilon_and_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(layers, "residual_mlp", lambda *given, **options: seen.update(options))
    gamma, scale = torch.ones(4), torch.ones(2)
    Mlp(4, 8)(torch.zeros(2, 4), nn.LayerNorm(4, eps=0.1), scale, "reference", gamma)
    assert (seen["gamma"] is gamma, seen["branch_scale"] is scale) == (True, True)
    assert (seen["eps"], seen["backend"]) == (0.1, "reference")
