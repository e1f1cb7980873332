"""Patch merging: every backend against the reference in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_no_worse
from op_samples import Inputs, merge_inputs, wave
from simmim_kernels import merge_patches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, W, C, M
SHAPES = [
    (1, 2, 2, 1, 1),
    (2, 6, 2, 10, 20),
    (1, 2, 6, 24, 48),
    (3, 4, 2, 100, 7),
    (1, 4, 6, 63, 130),
]
SMALL = (2, 4, 6, 24, 40)


def gradients(inputs: Inputs, autocast: torch.dtype | None = None, **options: Any) -> Inputs:
    """The output and the gradient of every input."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = merge_patches(**leaves, **options)
    out.backward(wave(out))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_as_exact_as_torch(inputs: Inputs, backend: str) -> None:
    exact = gradients({k: t.double() for k, t in inputs.items()}, backend="reference")
    plain = gradients(inputs, backend="reference")
    found = gradients(inputs, backend=backend)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in plain.items()}
    assert_no_worse(found, plain, exact, inputs["x"].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    assert_as_exact_as_torch(merge_inputs(shape, dtype), backend)


def test_the_published_order_of_neighbours(backend: str) -> None:
    """As the source slices: even and odd rows of the even columns, then of the odd ones."""
    inputs = merge_inputs(SMALL, torch.float32)
    x = inputs["x"]
    merged = torch.cat(
        [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1
    )
    y = torch.nn.functional.layer_norm(
        merged, merged.shape[3:], inputs["norm_weight"], inputs["norm_bias"]
    )
    found = merge_patches(**inputs, backend=backend)
    torch.testing.assert_close(found, y @ inputs["weight"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_digits(dtype: torch.dtype, backend: str) -> None:
    """The variance as a difference of two sums would lose ten bits here."""
    assert_as_exact_as_torch(merge_inputs(SMALL, dtype, 100.0), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_rows(dtype: torch.dtype, backend: str) -> None:
    """More rows than one program or section takes."""
    assert_as_exact_as_torch(merge_inputs((3, 10, 14, 12, 20), dtype), backend)


def test_rows_that_several_warps_share(backend: str) -> None:
    assert_as_exact_as_torch(merge_inputs((1, 2, 4, 330, 20), torch.bfloat16), backend)


def test_eps(backend: str) -> None:
    inputs = merge_inputs(SMALL, torch.float32)
    inputs["x"] *= 1e-3
    expected = gradients(inputs, eps=1e-2, backend="reference")
    found = gradients(inputs, eps=1e-2, backend=backend)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_vectors_beside_16_bit_matrices(dtype: torch.dtype, backend: str) -> None:
    inputs = merge_inputs(SMALL, dtype)
    exact = gradients({k: t.double() for k, t in inputs.items()}, backend="reference")
    plain = gradients(inputs, backend="reference")
    mixed = {k: t.float() if t.dim() == 1 else t for k, t in inputs.items()}
    found = gradients(mixed, backend=backend)
    for name, got in found.items():
        assert got.dtype == (torch.float32 if name.startswith("norm") else dtype), name
    assert_no_worse(found, plain, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, x_dtype: torch.dtype, backend: str) -> None:
    """Parameters stay float32; the result is as exact as the reference's under autocast."""
    inputs = merge_inputs(SMALL, torch.float32)
    inputs["x"] = inputs["x"].to(x_dtype)
    exact = gradients({k: t.double() for k, t in inputs.items()}, backend="reference")
    plain = gradients(inputs, dtype, backend="reference")
    found = gradients(inputs, dtype, backend=backend)
    assert found["out"].dtype == dtype
    for name, tensor in inputs.items():
        assert found[name].dtype == tensor.dtype, name
    assert_no_worse(found, plain, exact, dtype)


def test_strided_tensors(backend: str) -> None:
    inputs = merge_inputs(SMALL, torch.float32)
    strided = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in inputs.items()}
    strided["norm_bias"] = torch.stack([inputs["norm_bias"]] * 2, 1)[:, 0]
    strided["x"] = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not any(t.is_contiguous() for k, t in strided.items() if k != "norm_weight")
    expected = gradients(inputs, backend="reference")
    found = gradients(strided, backend=backend)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 4), (2, 4, 0)], ids=str)
def test_nothing_to_merge(shape: tuple, backend: str) -> None:
    inputs = merge_inputs(SMALL, torch.float32)
    inputs["x"] = torch.zeros(*shape, 24)
    found = gradients(inputs, backend=backend)
    assert found.pop("out").shape == (shape[0], shape[1] // 2, shape[2] // 2, 40)
    for name, grad in found.items():
        assert grad.shape == inputs[name].shape, name
        assert (grad == 0).all(), name


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_with_any_number_of_threads(threads: int) -> None:
    inputs = merge_inputs((3, 10, 14, 12, 20), torch.float32)
    before = torch.get_num_threads()
    expected = gradients(inputs)
    torch.set_num_threads(threads)
    try:
        found = gradients(inputs)
    finally:
        torch.set_num_threads(before)
    for name in ("x", "norm_weight", "norm_bias"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_the_backward(dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    leaves = {k: t.requires_grad_() for k, t in merge_inputs(SMALL, dtype).items()}
    # parameters in the form in which the op gets them
    parameters = {tuple(t.shape) for k, t in leaves.items() if k != "x"}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if tuple(t.shape) not in parameters:
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        merge_patches(**leaves, backend=backend)
    B, H, W, C, _ = SMALL
    expected = B * H * W * C * dtype.itemsize + B * H * W // 4 * 2 * 4
    assert sum(t.numel() * t.element_size() for t in kept.values()) == expected
