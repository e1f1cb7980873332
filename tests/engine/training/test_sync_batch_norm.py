"""Batch norms over two processes, two threads here, are those of one with both batches."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simmim.training import sync_batch_norm
from simmim.training.sync_batch_norm import CpuSyncBatchNorm, convert


class Pair:
    """`all_reduce` of two threads."""

    def __init__(self) -> None:
        self._meet, self._given = threading.Barrier(2, timeout=60), list[Tensor]()

    def all_reduce(self, tensor: Tensor, group: object = None) -> None:
        self._given.append(tensor.clone())
        self._meet.wait()
        total = torch.stack(self._given).sum(0)
        self._meet.wait()
        self._given.clear()
        self._meet.wait()
        tensor.copy_(total)


def in_two(work: Callable[[int], None], patch: pytest.MonkeyPatch) -> None:
    """Call `work` with 0 and 1, at once."""
    patch.setattr(sync_batch_norm.dist, "all_reduce", Pair().all_reduce)
    patch.setattr(sync_batch_norm, "_is_shared", lambda: True)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def norm(seed: int = 0) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(3, eps=0.1, momentum=0.3).double()
    generator = torch.Generator().manual_seed(seed)
    for tensor in (made.weight.data, made.bias.data, made.running_mean, made.running_var):
        tensor.copy_(torch.rand(3, generator=generator) + 0.5)
    return made


def test_two_parts_of_a_batch_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(5, 3, 4, 2, generator=generator, dtype=torch.float64) * 2 + 3
    slope = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    whole, whole_image = norm(), image.clone().requires_grad_()
    expected = whole(whole_image)
    (expected * slope).sum().backward()

    parts = [slice(0, 2), slice(2, 5)]  # of different sizes
    norms = [convert(norm()) for _ in parts]
    images = [image[part].clone().requires_grad_() for part in parts]
    found: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        found[rank] = norms[rank](images[rank])
        (found[rank] * slope[parts[rank]]).sum().backward()

    in_two(work, monkeypatch)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(found[rank], expected[part])
        torch.testing.assert_close(images[rank].grad, whole_image.grad[part])
        torch.testing.assert_close(norms[rank].running_mean, whole.running_mean)
        torch.testing.assert_close(norms[rank].running_var, whole.running_var)
    for name in ("weight", "bias"):
        own = sum(getattr(each, name).grad for each in norms)
        torch.testing.assert_close(own, getattr(whole, name).grad)


def test_one_value_of_a_channel_has_no_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_batch_norm.dist, "all_reduce", lambda tensor, group=None: None)
    monkeypatch.setattr(sync_batch_norm, "_is_shared", lambda: True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        convert(norm())(torch.zeros(1, 3, 1, 1, dtype=torch.float64))


def test_a_converted_norm_keeps_its_settings_tensors_and_mode() -> None:
    for training in (True, False):
        before = norm().train(training)
        after = convert(before)
        assert isinstance(after, CpuSyncBatchNorm)
        assert (after.num_features, after.eps, after.momentum) == (3, 0.1, 0.3)
        assert after.weight is before.weight
        assert after.running_var is before.running_var
        assert after.training == training
        assert convert(after) is after
    bare = convert(nn.BatchNorm1d(2, affine=False, track_running_stats=False))
    assert bare.weight is None
    assert bare.running_mean is None


def test_outside_of_training_or_alone_it_is_a_plain_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    alone = convert(norm())
    assert torch.equal(alone(image), norm()(image))
    monkeypatch.setattr(sync_batch_norm, "_is_shared", lambda: True)
    assert torch.equal(convert(norm().eval())(image), norm().eval()(image))


def test_norms_of_a_tree_are_converted_and_unknown_ones_refused() -> None:
    tree = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(norm()))
    assert convert(tree) is tree
    assert isinstance(tree[1][0], CpuSyncBatchNorm)

    class Other(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="a Other cannot be synchronised"):
        convert(nn.Sequential(Other(3)))


def test_the_extras_of_timm_s_norms_are_applied() -> None:
    class WithExtras(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(3)
            self.drop, self.act = nn.Identity(), nn.ReLU()

    after = convert(WithExtras().eval())
    assert after(-torch.ones(1, 3, 1, 1)).tolist() == torch.zeros(1, 3, 1, 1).tolist()
