"""Copies of weights: used while they are in use and true, and made where there is none."""

import torch

from simmim_kernels.weight_copies import WeightCopies, in_dtype


def test_a_copy_is_used_where_it_is_that_of_the_weight() -> None:
    weight, other = torch.randn(3, 4), torch.randn(3, 4)
    copies = WeightCopies([weight], torch.bfloat16)
    assert in_dtype(weight, torch.float32) is weight
    with copies.in_use():
        copy = in_dtype(weight, torch.bfloat16)
        assert torch.equal(copy, weight.bfloat16())
        assert in_dtype(weight, torch.bfloat16) is copy
        # as autograd hands it out
        assert in_dtype(weight.detach(), torch.bfloat16) is copy
        assert in_dtype(weight, torch.float32) is weight
        # another dtype, another shape, another weight
        assert torch.equal(in_dtype(weight, torch.float16), weight.half())
        assert in_dtype(weight.view(4, 3), torch.bfloat16).shape == (4, 3)
        assert torch.equal(in_dtype(other, torch.bfloat16), other.bfloat16())
    assert in_dtype(weight, torch.bfloat16) is not copy


def test_a_weight_that_changes_loses_its_copy_until_the_next_use() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    copies = WeightCopies([weight], torch.bfloat16)
    with copies.in_use():
        before = in_dtype(weight, torch.bfloat16)
        with torch.no_grad():
            weight.add_(1)
        assert in_dtype(weight, torch.bfloat16).tolist() == [1, 1]
    with copies.in_use():
        again = in_dtype(weight, torch.bfloat16)
        assert again.tolist() == [1, 1]
        assert again.data_ptr() == before.data_ptr()  # where a CUDA graph reads it


def test_copies_end_with_an_error_too() -> None:
    weight = torch.zeros(2)
    copies = WeightCopies([weight], torch.bfloat16)
    try:
        with copies.in_use():
            copy = in_dtype(weight, torch.bfloat16)
            raise KeyError
    except KeyError:
        pass
    assert in_dtype(weight, torch.bfloat16) is not copy


def test_no_weights() -> None:
    with WeightCopies([], torch.float32).in_use():
        pass
