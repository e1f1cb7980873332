"""Masks as a function of seed, epoch and sample."""

import pytest
import torch

from simmim.model import masking
from simmim.model.masking import sample_mask


def test_sample_mask() -> None:
    options = {"patch_size": 4, "mask_unit": 32, "ratio": 0.6, "seed": 5}
    ids, epochs = torch.tensor([4, -1, 9]), torch.tensor([0, 0, 2])
    mask = sample_mask(ids, epochs, (48, 48), **options)
    assert mask.sum((1, 2)).tolist() == [22, 0, 22]
    assert mask.shape == (3, 6, 6)
    alone = sample_mask(ids[2:], epochs[2:], (48, 48), **options)
    assert torch.equal(mask[2], alone[0])
    wide = sample_mask(ids[:1], epochs[:1], (24, 56), **options)
    assert wide.shape == (1, 3, 7)
    assert int(wide.sum()) == 13  # ceil(21 · 0.6)
    with pytest.raises(ValueError, match=r"units of 32 px do not tile 50×48 tokens of 4 px"):
        sample_mask(ids, epochs, (50, 48), **options)


def test_masks_follow_seed_epoch_and_sample() -> None:
    def mask(sample: int, epoch: int, seed: int) -> torch.Tensor:
        ids, epochs = torch.tensor([sample]), torch.tensor([epoch])
        return sample_mask(ids, epochs, (16, 16), patch_size=4, mask_unit=8, ratio=0.5, seed=seed)

    first = mask(3, 1, 7)
    assert torch.equal(first, mask(3, 1, 7))
    for other in (mask(4, 1, 7), mask(3, 2, 7), mask(3, 1, 8)):
        assert not torch.equal(first, other)


def test_the_wanted_backend_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def noted(*given: object, backend: str | None, **options: object) -> torch.Tensor:
        seen.append(backend)
        return torch.ones(1, 8, 8, dtype=torch.bool)

    monkeypatch.setattr(masking, "random_patch_mask", noted)
    options = {"patch_size": 4, "mask_unit": 8, "ratio": 0.5, "seed": 5, "backend": "reference"}
    sample_mask(torch.tensor([0]), torch.tensor([0]), (16, 16), **options)
    assert seen == ["reference"]


@pytest.mark.parametrize(
    ("unit", "grid"), [(6, (12, 12)), (8, (15, 16)), (8, (16, 15)), (20, (16, 20))]
)
def test_units_that_are_not_whole_patches_or_do_not_tile_are_refused(
    unit: int, grid: tuple[int, int]
) -> None:
    first = torch.tensor([0])
    with pytest.raises(ValueError, match=f"units of {unit} px do not tile {grid[0]}×{grid[1]}"):
        sample_mask(first, first, grid, patch_size=4, mask_unit=unit, ratio=0.5, seed=0)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.25, 16), (0.26, 17), (1.0, 64)])
def test_the_share_of_units_is_rounded_up(ratio: float, hidden: int) -> None:
    options = {"patch_size": 2, "mask_unit": 4, "ratio": ratio, "seed": 5}
    mask = sample_mask(torch.tensor([0]), torch.tensor([0]), (16, 16), **options)
    assert int(mask.sum()) == hidden
