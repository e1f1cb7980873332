"""Layers that backbones share: stochastic depth, recomputed blocks, initial values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim.backbone import layers
from simmim.backbone.layers import (
    Mlp,
    check_image,
    init_linear,
    run_block,
    scale_branch,
)


def test_a_branch_is_scaled_image_by_image_in_its_own_type() -> None:
    branch = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    scaled = scale_branch(branch, torch.tensor([0.0, 2.0]))
    assert scaled.dtype == torch.bfloat16
    assert scaled.flatten(1).unique(dim=1).tolist() == [[0.0], [2.0]]
    assert scale_branch(branch, None) is branch


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_is_computed_again_only_where_that_is_wanted(recompute: bool) -> None:
    runs: list[int] = []
    drawn: list[Tensor] = []

    class Block(nn.Module):
        def drop_path(self, x: Tensor) -> Tensor:
            drawn.append(torch.rand(1, len(x)))
            return drawn[-1]

        def forward(self, x: Tensor, factor: int, scales: Tensor) -> Tensor:
            runs.append(factor)
            return (x * factor * scales[0]).exp()

    x = torch.ones(2, requires_grad=True)
    run_block(Block(), recompute, x, 3).sum().backward()
    assert runs == [3] * (2 if recompute else 1)
    ((scales,),) = drawn  # once, although the block ran again
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * scales * (3 * scales).exp())


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 8, 16), (3, 8, 16), (1, 3, 16, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    check_image(torch.zeros(1, 3, 8, 16), 3, (8, 16))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 8, 16\]"):
        check_image(torch.zeros(shape), 3, (8, 16))


@pytest.mark.parametrize("draws", [None, True, False])
def test_what_a_block_draws_is_drawn_again_unless_it_says_that_it_draws_nothing(
    draws: bool | None,
) -> None:
    factors: list[Tensor] = []

    class Block(nn.Module):
        def drop_path(self, x: Tensor) -> None:
            return None

        def forward(self, x: Tensor, scales: None) -> Tensor:
            factors.append(torch.rand(2))
            return (x * factors[-1]).exp()

    block = Block()
    if draws is not None:
        block.draws = draws
    run_block(block, True, torch.ones(2, requires_grad=True)).sum().backward()
    first, second = factors
    assert torch.equal(first, second) == (draws is not False)


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
