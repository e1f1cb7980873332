"""Masks at any grid, ratio and unit: exact counts, whole units, functions of their keys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmim.backbone.vit import ViTSpec
from simmim.model.image_model import MaskedImageModel
from simmim.model.masking import sample_mask

UNITS = st.tuples(st.integers(1, 8), st.integers(1, 8))
RATIOS = st.floats(1e-6, 1)
SAMPLES = st.lists(st.tuples(st.integers(-1, 2**40), st.integers(0, 999)), min_size=1, max_size=5)


def masks(
    samples: list[tuple[int, int]], units: tuple[int, int], ratio: float, seed: int, unit: int = 1
) -> torch.Tensor:
    ids, epochs = torch.tensor(samples).T
    grid = (units[0] * unit, units[1] * unit)
    return sample_mask(ids, epochs, grid, patch_size=4, mask_unit=4 * unit, ratio=ratio, seed=seed)


@given(samples=SAMPLES, units=UNITS, ratio=RATIOS, unit=st.integers(1, 4))
def test_every_sample_hides_the_same_share_and_an_empty_slot_nothing(
    samples: list[tuple[int, int]], units: tuple[int, int], ratio: float, unit: int
) -> None:
    mask = masks(samples, units, ratio, 3, unit)
    assert mask.shape == (len(samples), *units)
    assert mask.dtype == torch.bool
    count = math.ceil(units[0] * units[1] * ratio)
    assert mask.sum((1, 2)).tolist() == [count if sample >= 0 else 0 for sample, _ in samples]


@given(samples=SAMPLES, ratio=RATIOS, seed=st.integers(0, 2**63), data=st.data())
def test_a_mask_is_a_function_of_seed_epoch_and_sample(
    samples: list[tuple[int, int]], ratio: float, seed: int, data: st.DataObject
) -> None:
    order = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=4))
    whole = masks(samples, (6, 7), ratio, seed)
    assert torch.equal(masks([samples[i] for i in order], (6, 7), ratio, seed), whole[order])


@given(
    samples=st.lists(st.tuples(*[st.integers(0, 2**40)] * 3), min_size=2, max_size=4, unique=True)
)
def test_another_seed_epoch_or_sample_has_another_mask(
    samples: list[tuple[int, int, int]],
) -> None:
    # 144 units, half of them hidden: two draws agree once in 10^42
    drawn = {masks([(i, e)], (12, 12), 0.5, seed).numpy().tobytes() for i, e, seed in samples}
    assert len(drawn) == len(samples)


@given(units=UNITS, unit=st.integers(2, 5), rest=st.tuples(*[st.integers(0, 4)] * 2))
def test_units_that_do_not_tile_the_tokens_are_refused(
    units: tuple[int, int], unit: int, rest: tuple[int, int]
) -> None:
    grid = (units[0] * unit + rest[0], units[1] * unit + rest[1])
    ids = torch.zeros(1, dtype=torch.int64)
    options = {"patch_size": 4, "ratio": 0.5, "seed": 0}
    if any(side % unit for side in grid):
        with pytest.raises(ValueError, match="do not tile"):
            sample_mask(ids, ids, grid, mask_unit=4 * unit, **options)
    else:
        made = sample_mask(ids, ids, grid, mask_unit=4 * unit, **options)
        assert made.shape[1:] == (grid[0] // unit, grid[1] // unit)
    with pytest.raises(ValueError, match="do not tile"):
        sample_mask(ids, ids, grid, mask_unit=4 * unit + 2, **options)


@given(units=st.tuples(*[st.integers(1, 4)] * 2), unit=st.integers(1, 4), seed=st.integers(0, 99))
def test_tokens_and_pixels_are_hidden_in_whole_units(
    units: tuple[int, int], unit: int, seed: int
) -> None:
    grid = (units[0] * unit, units[1] * unit)
    spec = ViTSpec(
        image_size=(2 * grid[0], 2 * grid[1]),
        patch_size=2,
        embed_dim=4,
        depth=1,
        num_heads=1,
    )
    model = MaskedImageModel(spec.build())
    mask = masks([(7, 0), (8, 0)], units, 0.4, seed)
    tokens, pixels = model.token_mask(mask), model.pixel_mask(mask)
    assert tokens.shape == (2, *grid)
    assert pixels.shape == (2, 1, 2 * grid[0], 2 * grid[1])
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = mask[:, row // unit, column // unit]
            assert torch.equal(tokens[:, row, column], expected)
            block = pixels[:, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(block, expected[:, None, None].expand(2, 2, 2))
