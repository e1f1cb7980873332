"""Stochastic depth: rates of blocks, and draws as functions of seed, epoch, sample and block."""

import pytest
import torch
from torch import nn

from simmim.backbone.stochastic_depth import (
    DropPath,
    branch_of,
    drop_path_rates,
    number_blocks,
    of_samples,
    of_view,
)
from simmim_kernels import random_branch_scales


def test_rates_grow_linearly_from_nothing_to_the_configured_one() -> None:
    assert drop_path_rates(0.4, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_rates(0.4, 1) == [0.0]


def test_branches_are_dropped_at_their_rate_and_the_others_scaled() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    scale = drop(torch.zeros(4000, 2))
    assert scale is not None
    assert scale.shape == (1, 4000)
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (scale == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drop.eval()(torch.zeros(4, 2)) is None
    assert DropPath(0.0)(torch.zeros(4, 2)) is None


def test_named_samples_are_drawn_for_alike_in_any_batch_and_order() -> None:
    drop = DropPath(0.5, branches=2)
    drop.block = 3
    ids, epochs = torch.arange(64), torch.arange(64) // 40

    def drawn(order: torch.Tensor) -> torch.Tensor:
        with of_samples(7, epochs[order], ids[order]):
            scales = drop(torch.zeros(len(order), 1))
        assert scales is not None
        return scales

    whole = drawn(torch.arange(64))
    expected = random_branch_scales(0.5, 2, seed=7, ids=ids, epochs=epochs, block=3)
    assert torch.equal(whole, expected)
    order = torch.randperm(64)
    torch.manual_seed(1)  # of no influence
    assert torch.equal(drawn(order), whole[:, order])
    assert torch.equal(drawn(order[:9]), whole[:, order[:9]])


def test_views_and_blocks_have_draws_of_their_own() -> None:
    blocks = nn.ModuleList(DropPath(0.5) for _ in range(2))
    number_blocks(blocks)
    ids = torch.arange(256)
    with of_samples(0, torch.zeros_like(ids), ids):
        first, second = (block(ids) for block in blocks)
        with of_view(1):
            other = blocks[0](ids)
        # two views one after the other
        both = blocks[0](torch.cat([ids, ids]))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(both, torch.cat([first, other], dim=1))


def test_images_that_are_not_named_are_refused() -> None:
    ids = torch.arange(4)
    with of_samples(0, ids, ids), pytest.raises(ValueError, match="3 images are no views of the 4"):
        DropPath(0.5)(torch.zeros(3, 1))


def test_outside_of_named_samples_torch_draws() -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(5)
        scales = DropPath(0.5, branches=2)(torch.zeros(64, 1))
        assert scales is not None
        return scales

    ids = torch.arange(64)
    with of_view(1):  # of nothing
        before = drawn()
    with of_samples(0, ids, ids):
        inside = drawn()
    assert torch.equal(drawn(), before)
    assert not torch.equal(inside, before)


def test_the_factors_of_a_branch() -> None:
    scales = torch.arange(6.0).view(2, 3)
    second = branch_of(scales, 1)
    assert second is not None
    assert second.tolist() == [3.0, 4.0, 5.0]
    assert branch_of(None, 1) is None
