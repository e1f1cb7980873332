"""Masks as a function of seed, epoch and sample."""

import pytest
import torch

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
