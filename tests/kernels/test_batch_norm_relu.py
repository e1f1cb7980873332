"""Batch norm, sum and ReLU: every backend against the reference in float64, and PyTorch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import assert_no_worse
from op_samples import Inputs, batch_norm_inputs, channels_last, wave
from simmim_kernels import batch_norm_relu, native

NEEDS_NATIVE = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
BACKENDS = ["reference", pytest.param("native", marks=NEEDS_NATIVE)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, C and sides of the map
SHAPES = [
    (2, 1),
    (7, 10),
    (1, 3, 2),
    (2, 16, 3, 3),
    (3, 63, 5, 7),
    (5, 100, 1, 2),
    (2, 40, 2, 3, 2),
]
SMALL = (3, 20, 4, 5)


@pytest.fixture(params=[False, True], ids=["alone", "residual"])
def added(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def results(inputs: Inputs, **options: Any) -> Inputs:
    """The output, both statistics, and the gradient of every input."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out, mean, variance = batch_norm_relu(**leaves, **options)
    assert not mean.requires_grad
    assert not variance.requires_grad
    out.backward(wave(out))
    found = {"out": out.detach(), "mean": mean, "variance": variance}
    return found | {name: leaf.grad for name, leaf in leaves.items()}


def torch_results(inputs: Inputs) -> Inputs:
    """The same by PyTorch's operations in the dtype of the inputs."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    x, C = leaves["x"], leaves["x"].shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, variance = torch.zeros(C, dtype=wide), torch.zeros(C, dtype=wide)
    affine = [leaves[name].to(wide) for name in ("weight", "bias")]
    normed = F.batch_norm(x, mean, variance, *affine, True, 1.0, 1e-5)
    out = F.relu(normed + leaves["residual"] if "residual" in leaves else normed)
    out.backward(wave(out))
    count = x.numel() // C
    found = {"out": out.detach(), "mean": mean, "variance": variance * (count - 1) / count}
    return found | {name: leaf.grad for name, leaf in leaves.items()}


def wide(inputs: Inputs) -> Inputs:
    return {name: t.double() for name, t in inputs.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_pytorch(shape: tuple, added: bool) -> None:
    inputs = wide(batch_norm_inputs(shape, torch.float32, added))
    expected, found = torch_results(inputs), results(inputs, backend="reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(shape: tuple, dtype: torch.dtype, added: bool) -> None:
    inputs = batch_norm_inputs(shape, dtype, added)
    exact = results(wide(inputs), backend="reference")
    plain, found = torch_results(inputs), results(inputs, backend="native")
    for name, value in inputs.items():
        assert found[name].dtype == value.dtype, name
    assert found["out"].stride() == inputs["x"].stride()
    assert_no_worse(found, plain, exact, dtype)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_digits(dtype: torch.dtype, added: bool) -> None:
    """The variance as a difference of two sums would lose thirteen bits here."""
    inputs = batch_norm_inputs((3, 20, 9, 11), dtype, added, 200.0)
    exact = results(wide(inputs), backend="reference")
    plain = results(inputs, backend="reference")
    assert_no_worse(results(inputs, backend="native"), plain, exact, dtype)


@NEEDS_NATIVE
def test_one_value_far_away(added: bool) -> None:
    """The first rows of a section tell what to take away before squaring; these mislead."""
    inputs = batch_norm_inputs((4, 16, 9, 11), torch.float32, added)
    inputs["x"][0, :, 0, 0] = 1e4
    exact = results(wide(inputs), backend="reference")
    found = results(inputs, backend="native")
    assert_no_worse(found, results(inputs, backend="reference"), exact, torch.float32)
    torch.testing.assert_close(found["variance"].double(), exact["variance"], rtol=1e-5, atol=0)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(target: str, dtype: torch.dtype, added: bool) -> None:
    """Over more rows than a section has, and channels that fill no register."""
    best = native.extension.target()
    if not native.extension.use_target(target):
        pytest.skip(f"no {target} here")
    try:
        inputs = batch_norm_inputs((5, 38, 57, 61), dtype, added)
        exact = results(wide(inputs), backend="reference")
        plain = results(inputs, backend="reference")
        assert_no_worse(results(inputs, backend="native"), plain, exact, dtype)
    finally:
        native.extension.use_target(best)


@NEEDS_NATIVE
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_with_any_number_of_threads(threads: int, added: bool) -> None:
    inputs, before = (
        batch_norm_inputs((5, 38, 17, 21), torch.bfloat16, added),
        torch.get_num_threads(),
    )
    expected = results(inputs, backend="native")
    torch.set_num_threads(threads)
    try:
        found = results(inputs, backend="native")
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend: str, added: bool) -> None:
    inputs = batch_norm_inputs(SMALL, torch.float32, added)
    inputs["x"] *= 1e-2
    expected = results(wide(inputs), eps=1e-1, backend="reference")
    found = results(inputs, eps=1e-1, backend=backend)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_vectors_beside_16_bit_maps(dtype: torch.dtype, backend: str, added: bool) -> None:
    inputs = batch_norm_inputs(SMALL, dtype, added)
    exact = results(wide(inputs), backend="reference")
    plain = results(inputs, backend="reference")
    mixed = {k: t.float() if t.dim() == 1 else t for k, t in inputs.items()}
    found = results(mixed, backend=backend)
    for name in ("weight", "bias", "mean", "variance"):
        assert found[name].dtype == torch.float32, name
    assert_no_worse(found, plain, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channels(backend: str) -> None:
    """Of a channel that is the same everywhere the bias is left, and no gradient of x."""
    x = channels_last(torch.full((2, 3, 4, 4), 0.1)).requires_grad_()
    bias = torch.tensor([1.0, -1.0, 0.5])
    out, _, variance = batch_norm_relu(x, torch.ones(3), bias, backend=backend)
    torch.testing.assert_close(variance, torch.zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(out, bias.relu().view(1, 3, 1, 1).expand_as(x), rtol=0, atol=1e-4)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_cut_away(backend: str, added: bool) -> None:
    inputs = batch_norm_inputs(SMALL, torch.float32, added)
    inputs["x"][1, 4, 2, 3] = torch.nan
    out, mean, variance = batch_norm_relu(**inputs, backend=backend)
    for found in (out[:, 4], mean[4], variance[4]):
        assert found.isnan().all()
    assert not out[:, 5].isnan().any()


@NEEDS_NATIVE
def test_other_orders_go_to_the_reference(added: bool) -> None:
    inputs = batch_norm_inputs(SMALL, torch.float32, added)
    expected = results(inputs)
    plain = {k: t.contiguous() for k, t in inputs.items()}
    for name, value in results(plain).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="channels-last"):
        batch_norm_relu(**plain, backend="native")


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_the_backward(dtype: torch.dtype, added: bool) -> None:
    leaves = {k: t.requires_grad_() for k, t in batch_norm_inputs(SMALL, dtype, added).items()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out, *_ = batch_norm_relu(**leaves, backend="native")
    map_bytes = leaves["x"].numel() * dtype.itemsize
    expected = map_bytes * (2 if added else 1) + 4 * 4 * SMALL[1]
    assert sum(t.numel() * t.element_size() for t in kept.values()) == expected
    assert (out.data_ptr() in kept) == added


@NEEDS_NATIVE
def test_gradients_are_added_up_in_place() -> None:
    """Those of a residual meet those of the branch that it bridges, without another map."""
    x = channels_last(torch.randn(2, 64, 64, 64)).requires_grad_()
    y = x * 1  # whose gradient has two parts
    out, *_ = batch_norm_relu(y, torch.ones(64), torch.ones(64), y, backend="native")
    with torch.profiler.profile() as seen:
        out.backward(wave(out))
    names = [event.key for event in seen.key_averages()]
    assert "aten::add_" in names
    assert "aten::add" not in names
