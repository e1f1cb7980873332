"""random_patch_mask: counts, units, purity, uniformity, and the published counts."""

import itertools

import pytest
import torch

from numerics import load_golden_json
from simmim_kernels import random_patch_mask

GOLDEN = load_golden_json("mask-generator")


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['input_size']}-{c['mask_ratio']}"
)
def test_published_counts(case: dict, backend: str) -> None:
    tokens = case["input_size"] // case["model_patch_size"]
    mask = random_patch_mask(
        3,
        (tokens, tokens),
        ratio=case["mask_ratio"],
        unit=case["tokens_per_cell_side"],
        seed=1,
        backend=backend,
    )
    assert list(mask.shape[1:]) == case["mask_shape"]
    assert mask.sum((1, 2)).tolist() == [case["masked_tokens"]] * 3


@pytest.mark.parametrize("case", GOLDEN["float_edge_cases"], ids=lambda c: str(c["mask_ratio"]))
def test_ratio_rounds_up_in_float64(case: dict) -> None:
    side = case["input_size"] // case["mask_patch_size"]
    mask = random_patch_mask(1, (side, side), ratio=case["mask_ratio"], seed=0)
    assert int(mask.sum()) == case["masked_cells"]


@pytest.mark.parametrize("grid", [(1, 1), (7, 1), (6, 6), (8, 12), (21, 5)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 1.0])
def test_exact_count_on_any_grid(grid: tuple[int, int], ratio: float, backend: str) -> None:
    mask = random_patch_mask(5, grid, ratio=ratio, seed=3, backend=backend)
    expected = -int(-(grid[0] * grid[1] * ratio) // 1)
    assert mask.dtype == torch.bool
    assert mask.sum((1, 2)).tolist() == [expected] * 5


def test_whole_units(backend: str) -> None:
    mask = random_patch_mask(4, (24, 16), unit=8, seed=5, backend=backend)
    units = mask.view(4, 3, 8, 2, 8)
    assert torch.equal(units, units[:, :, :1, :, :1].expand_as(units))


def test_pure_function_of_seed_epoch_id(backend: str) -> None:
    whole = random_patch_mask(
        6, (6, 6), seed=9, ids=torch.tensor([3, 1, 4, 1, 5, 9]), epoch=2, backend=backend
    )
    for slot, sample in enumerate([3, 1, 4, 1, 5, 9]):
        alone = random_patch_mask(
            1, (6, 6), seed=9, ids=[sample], epoch=torch.tensor([2]), backend=backend
        )
        assert torch.equal(whole[slot], alone[0])
    assert torch.equal(whole[1], whole[3])
    changed = [
        random_patch_mask(1, (6, 6), seed=seed, ids=[sample], epoch=epoch, backend=backend)
        for seed, sample, epoch in [
            (9, 3, 2),
            (10, 3, 2),
            (9, 4, 2),
            (9, 3, 3),
            (2, 3, 9),
            (3, 9, 2),
        ]
    ]
    for a, b in itertools.combinations(changed, 2):
        assert not torch.equal(a, b)


def test_stays_what_it_is(backend: str) -> None:
    """A resumed or repeated run must draw the same masks in every release."""
    mask = random_patch_mask(
        2, (4, 5), ratio=0.5, seed=11, epoch=1, ids=[0, 123456789012], backend=backend
    )
    rows = ["".join("#" if x else "." for x in row) for image in mask.tolist() for row in image]
    assert rows == FIXED_ROWS


FIXED_ROWS = [".....", "##.##", "####.", "..#.#", "#..#.", "..###", "####.", "..#.."]


def test_every_unit_and_pair_is_equally_likely() -> None:
    mask = random_patch_mask(40_000, (6, 6), seed=1).flatten(1).float()
    cells = mask.mean(0)
    assert (cells - 22 / 36).abs().max() < 0.012  # five standard deviations
    pairs = mask.T @ mask / len(mask)
    pairs = pairs[~torch.eye(36, dtype=torch.bool)]
    assert (pairs - 22 * 21 / (36 * 35)).abs().max() < 0.013


def test_negative_and_huge_keys(backend: str) -> None:
    ids = torch.tensor([-1, -(2**63), 2**63 - 1])
    mask = random_patch_mask(3, (6, 6), seed=-7, ids=ids, epoch=2**40, backend=backend)
    assert mask.sum((1, 2)).tolist() == [22] * 3


@pytest.mark.parametrize("grid", [(4, 4), (12, 9), (24, 20)])
def test_every_backend_makes_the_same_mask(grid: tuple[int, int], backend: str) -> None:
    ids = torch.tensor([7, 2**40, -3])
    for unit, epochs in ((1, 3), (grid[0] // 4, torch.tensor([5, 0, 2**33]))):
        arguments = {"unit": unit, "seed": 2**70 + 5, "ids": ids, "epoch": epochs}
        if grid[1] % unit:
            continue
        expected = random_patch_mask(3, grid, **arguments, backend="reference")
        assert torch.equal(random_patch_mask(3, grid, **arguments, backend=backend), expected)


def test_too_many_units_for_one_triton_program() -> None:
    assert random_patch_mask(1, (96, 96), seed=0).sum() == 5530
    with pytest.raises(ValueError, match="'triton' is unknown here"):
        random_patch_mask(1, (96, 96), seed=0, backend="triton")


def test_empty_batch(backend: str) -> None:
    assert random_patch_mask(0, (6, 6), seed=0, backend=backend).shape == (0, 6, 6)
