"""random_branch_scales: rates, purity, and the draw number by number."""

import pytest
import torch
from torch import Tensor

from simmim_kernels import random_branch_scales
from simmim_kernels.random_branch_scales import STREAM
from simmim_kernels.splitmix import fold, fold_into, uniform

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton-interpreted"], indirect=True)
IDS, EPOCHS = torch.arange(5000) * 7919 - 3, torch.arange(5000) % 3


def drawn(rate: float, backend: str, **options: int) -> Tensor:
    given = {"branches": 2, "seed": 9} | options
    return random_branch_scales(rate, ids=IDS, epochs=EPOCHS, backend=backend, **given)


@BACKENDS
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.95])
def test_branches_are_dropped_at_their_rate_and_the_others_scaled(
    rate: float, backend: str
) -> None:
    scales = drawn(rate, backend)
    assert (scales.shape, scales.dtype) == ((2, 5000), torch.float32)
    assert (scales == 0).float().mean().item() == pytest.approx(rate, abs=0.015)
    assert scales[scales != 0].unique().tolist() == pytest.approx([1 / (1 - rate)])


@BACKENDS
def test_every_draw_is_that_of_its_key(backend: str) -> None:
    scales = drawn(0.37, backend, block=3, view=1)
    key = fold(STREAM, 9, 1, 3)
    for branch in range(2):
        for image in range(40):
            stream = fold_into(fold_into(key, int(EPOCHS[image])), int(IDS[image]))
            assert (scales[branch, image] != 0) == (uniform(stream, branch) >= 0.37)


@BACKENDS
def test_nothing_but_the_key_decides(backend: str) -> None:
    first = drawn(0.5, backend)
    torch.manual_seed(1)
    assert torch.equal(drawn(0.5, backend), first)
    part = random_branch_scales(0.5, 2, seed=9, ids=IDS[7:20], epochs=EPOCHS[7:20], backend=backend)
    assert torch.equal(part, first[:, 7:20])
    assert torch.equal(drawn(0.5, backend, branches=1), first[:1])
    others = [drawn(0.5, backend, **{name: 10}) for name in ("seed", "block", "view")]
    apart = [(first != other).float().mean().item() for other in others]
    assert apart == pytest.approx([0.5] * 3, abs=0.03)
    assert not torch.equal(first[0], first[1])


@BACKENDS
def test_no_images(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    out = random_branch_scales(0.5, 3, seed=0, ids=none, epochs=none, backend=backend)
    assert out.shape == (3, 0)
