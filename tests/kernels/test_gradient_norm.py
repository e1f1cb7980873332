"""gradient_norm against float64, and what clipping relies on."""

import pytest
import torch
from torch import Tensor

from simmim_kernels import gradient_norm, native

NEEDS_NATIVE = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
BACKENDS = ["reference", pytest.param("native", marks=NEEDS_NATIVE)]


def make(scale: float = 1.0) -> list[Tensor]:
    sizes = [(1,), (7,), (64, 63), (8192,), (8193,), (3, 100, 101), (0,), (), (500_001,)]
    return [torch.randn(size) * scale for size in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_against_float64(backend: str, scale: float) -> None:
    gradients = make(scale)
    expected = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    found = gradient_norm(gradients, backend=backend)
    assert found.shape == ()
    assert found.dtype == torch.float32
    # PyTorch adds a tensor's squares in float32, one after the other
    assert float(found) == pytest.approx(expected, rel=3e-7 if backend == "native" else 3e-5)


@NEEDS_NATIVE
@pytest.mark.parametrize("target", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(target: str) -> None:
    best = native.extension.target()
    if not native.extension.use_target(target):
        pytest.skip(f"no {target} here")
    try:
        gradients = make()
        expected = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
        assert float(gradient_norm(gradients, backend="native")) == pytest.approx(
            expected, rel=3e-7
        )
    finally:
        native.extension.use_target(best)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(backend: str, value: float) -> None:
    for place in (0, 8191, 8192, 500_000):
        gradients = make()
        gradients[-1][place] = value
        assert not gradient_norm(gradients, backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_has_no_length(backend: str) -> None:
    assert float(gradient_norm([], backend=backend)) == 0.0
    assert float(gradient_norm([torch.zeros(0)], backend=backend)) == 0.0


@NEEDS_NATIVE
def test_threads_change_nothing() -> None:
    gradients, before = make(), torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.add(float(gradient_norm(gradients, backend="native")))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_other_gradients_go_to_the_reference() -> None:
    for gradients in (
        [torch.randn(4, 5).t()],
        [torch.randn(9).bfloat16()],
        [torch.randn(9).double()],
    ):
        expected = torch.nn.utils.get_total_norm(gradients)
        assert torch.equal(gradient_norm(gradients), expected)
        with pytest.raises(RuntimeError, match="it takes"):
            gradient_norm(gradients, backend="native")


@NEEDS_NATIVE
def test_channels_last_counts_the_same() -> None:
    gradient = torch.randn(16, 3, 4, 4)
    turned = gradient.contiguous(memory_format=torch.channels_last)
    assert not turned.is_contiguous()
    found = gradient_norm([turned], backend="native")
    assert float(found) == pytest.approx(float(gradient.double().norm()), rel=3e-7)


def test_it_has_no_gradient() -> None:
    assert not gradient_norm([torch.randn(5, requires_grad=True)]).requires_grad
