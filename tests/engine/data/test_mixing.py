"""Mixup and CutMix: those of timm, and draws that follow their key only."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from labelled_images import seed_generators, states
from simmim.config.finetune import AugmentConfig
from simmim.data.mixing import Mixing, draws_from
from stand_in_timm import StandIns


def test_draws_follow_all_64_bits_of_the_key() -> None:
    drawn = []
    for key in (1, 1 + 2**32, 2**63 + 1, 2**64 - 1):
        with draws_from(key):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    python, numpy, torchs = (set(column) for column in zip(*drawn))
    assert len(python) == len(numpy) == 4
    assert len(torchs) == 2  # its CPU generator takes 32 bits, which our keys mix as well


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    image = torch.randn(size, 3, 16, 16, generator=generator)
    return image, torch.randint(0, 10, (size,), generator=generator)


def test_mixing_is_timms(timm_data: Any, keys: list[int]) -> None:
    mixing = Mixing(10, seed=4)
    theirs = timm_data.Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch",
        label_smoothing=0.1, num_classes=10,
    )  # fmt: skip
    cut = 0
    for step in range(20):
        image, label = batch()
        ours = mixing(image.clone(), label, step, 0)
        seed_generators(keys[-1])
        wanted = theirs(image.clone(), label)
        assert torch.equal(ours[0], wanted[0])
        assert torch.equal(ours[1], wanted[1])
        assert torch.allclose(ours[1].sum(1), torch.ones(8))
        cut += bool((ours[0] == image).any())
    assert 4 < cut < 16  # both are drawn


def test_mixing_is_a_function_of_seed_step_rank_and_micro_batch(timm_data: Any) -> None:
    seed_generators(1)
    before = states()
    results = {}
    for seed, place in [(0, (5, 1)), (0, (6, 1)), (0, (5, 0)), (1, (5, 1)), (0, (5, 1, 1))]:
        image, label = batch()
        first = Mixing(10, seed)(image.clone(), label, *place)
        again = Mixing(10, seed)(image.clone(), label, *place)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        results[seed, place] = first[1].numpy().tobytes()
    assert len(set(results.values())) == 5
    assert states() == before


def test_empty_slots_take_their_partners_image(timm_data: Any) -> None:
    mixing = Mixing(10, 4, AugmentConfig(smoothing=0.0))
    for step in range(6):
        image, label = batch()
        image[2], label[2] = 0, -1
        whole, whole_label = image.clone(), label.clone()
        whole[2], whole_label[2] = image[5], label[5]
        mixed, target = mixing(image.clone(), label, step, 0)
        wanted, wanted_target = mixing(whole.clone(), whole_label, step, 0)
        assert torch.equal(mixed, wanted)
        assert torch.equal(target, wanted_target)
        assert torch.allclose(mixed[2], whole[5])
        assert target[2, whole_label[5]] == pytest.approx(1.0)
        label[5] = -1  # both of a pair
        _, target = mixing(image, label, step, 0)
        assert target.sum(1).round(decimals=5).tolist() == [1, 1, 0, 1, 1, 0, 1, 1]


def test_odd_batches_cannot_be_mixed(timm_data: Any) -> None:
    image, label = batch(7)
    with pytest.raises(ValueError, match="7 images cannot be mixed in pairs"):
        Mixing(10, 0)(image, label, 0, 0)
    off = Mixing(10, 0, AugmentConfig(mixup=0.0, cutmix=0.0))
    label[3] = -1
    same, target = off(image.clone(), label, 0, 0)
    assert torch.equal(same, image)
    smooth = torch.full((7, 10), 0.01)
    smooth[torch.arange(7), label.clamp(min=0)] = 0.91
    smooth[3] = 0
    assert torch.allclose(target, smooth)


# Every value differs from its default, and from every other.
MIXED = AugmentConfig(
    mixup=0.3, cutmix=0.7, mix_probability=0.9, mix_switch=0.25, smoothing=0.04
)  # fmt: skip


def test_every_value_arrives_at_timms_mixup(stand_ins: StandIns) -> None:
    Mixing(7, 0, MIXED)
    assert stand_ins.mixups[0].options == {
        "mixup_alpha": 0.3,
        "cutmix_alpha": 0.7,
        "prob": 0.9,
        "switch_prob": 0.25,
        "mode": "batch",
        "label_smoothing": 0.04,
        "num_classes": 7,
    }


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0.0), (0.0, 0.7)])
def test_either_way_of_mixing_is_enough(stand_ins: StandIns, mixup: float, cutmix: float) -> None:
    mixing = Mixing(10, 0, AugmentConfig(mixup=mixup, cutmix=cutmix))
    assert mixing.enabled
    image, label = batch()
    assert not torch.equal(mixing(image.clone(), label, 0, 0)[0], image)


def test_draws_of_mixing_follow_seed_step_rank_and_micro_batch(stand_ins: StandIns) -> None:
    seed_generators(1)
    before, seen = states(), set()
    for seed, place in [(0, (5, 1)), (1, (5, 1)), (0, (6, 1)), (0, (5, 0)), (0, (5, 1, 1))]:
        image, label = batch()
        first = Mixing(10, seed, MIXED)(image.clone(), label, *place)[0]
        random.random(), np.random.rand()
        again = Mixing(10, seed, MIXED)(image.clone(), label, *place)[0]
        assert torch.equal(first, again)
        seen.add(first.numpy().tobytes())
        seed_generators(1)
    assert len(seen) == 5
    assert states() == before


def test_mixing_leaves_the_generators_as_they_were(stand_ins: StandIns) -> None:
    seed_generators(1)
    before = states()
    Mixing(10, 0, MIXED)(*batch(), 3, 0)
    assert states() == before


def test_empty_slots_are_mixed_as_copies_of_their_partners(stand_ins: StandIns) -> None:
    image, label = torch.arange(1.0, 7).view(6, 1, 1, 1), torch.arange(6)
    image[[1, 2, 3]], label[[1, 2, 3]] = 0.0, -1  # 1 has a partner, 2 and 3 are a pair
    mixed, target = Mixing(6, 0, MIXED)(image, label, 0, 0)
    added = mixed[2].item()
    assert (mixed.flatten() - added).tolist() == pytest.approx([3.5, 5, 0, 0, 5, 3.5], abs=1e-5)
    assert target.tolist() == [
        [0.5, 0, 0, 0, 0, 0.5],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0.5, 0, 0, 0, 0, 0.5],
    ]


def test_odd_batches_are_refused_by_their_number(stand_ins: StandIns) -> None:
    with pytest.raises(ValueError, match="7 images cannot be mixed in pairs"):
        Mixing(10, 0)(*batch(7), 0, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_targets_without_mixing_are_smoothed_as_configured(smoothing: float) -> None:
    mixing = Mixing(4, 0, AugmentConfig(mixup=0.0, cutmix=0.0, smoothing=smoothing))
    image = torch.randn(3, 1, 2, 2)
    same, target = mixing(image.clone(), torch.tensor([2, -1, 0]), 0, 0)
    assert torch.equal(same, image)
    off, on = smoothing / 4, 1 - smoothing + smoothing / 4
    wanted = torch.tensor([[off, off, on, off], [0, 0, 0, 0], [on, off, off, off]])
    torch.testing.assert_close(target, wanted)
