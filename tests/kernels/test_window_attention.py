"""window_attention: (shifted) windows of a feature map, by every backend."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simmim_kernels.window_attention import relative_position_bias, window_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, H, W], heads, head width, window, shift, form of the bias
SHAPES = [
    ((1, 12, 12), 1, 32, (6, 6), (3, 3), "table"),
    ((1, 7, 14), 2, 64, (7, 7), (0, 0), "pairs"),
    ((2, 8, 5), 1, 24, (8, 5), (0, 2), "table"),
    ((1, 6, 8), 3, 6, (2, 4), (1, 0), "pairs"),
    ((1, 4, 4), 3, 10, (2, 2), (1, 1), "table"),
    ((3, 3, 3), 2, 16, (3, 3), (0, 0), "none"),
    ((1, 2, 3), 1, 16, (1, 1), (0, 0), "none"),
    ((2, 1, 20), 2, 16, (1, 20), (0, 7), "none"),
    ((1, 12, 12), 1, 32, (12, 12), (6, 6), "table"),
    ((1, 9, 16), 1, 24, (9, 8), (4, 0), "pairs"),
    ((1, 1, 197), 1, 64, (1, 197), (0, 0), "none"),
]


def make_bias(form: str, num_heads: int, window: tuple[int, int]) -> Tensor | None:
    h, w = window
    if form == "table":
        return torch.randn((2 * h - 1) * (2 * w - 1), num_heads)
    return torch.randn(num_heads, h * w, h * w) if form == "pairs" else None


def out_and_gradients(
    function: Callable[..., Tensor], qkv: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    qkv = qkv.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    out = function(qkv, bias)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in (qkv, bias) if t is not None)]


def assert_as_exact_as_torch(
    qkv: Tensor, bias: Tensor | None, num_heads: int, *places: tuple[int, int], backend: str
) -> None:
    """At most twice the error of the reference in the dtype of qkv; truth is the one in float64."""
    grad = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3).to(qkv.dtype)

    def attend(name: str) -> Callable[..., Tensor]:
        return lambda qkv, bias: window_attention(qkv, bias, num_heads, *places, backend=name)

    wide_bias = None if bias is None else bias.double()
    exact = out_and_gradients(attend("reference"), qkv.double(), wide_bias, grad)
    plain = out_and_gradients(attend("reference"), qkv, bias, grad)
    found = out_and_gradients(attend(backend), qkv, bias, grad)
    for got, expected, torchs in zip(found, exact, plain, strict=True):
        assert got.dtype == torchs.dtype
        assert got.shape == expected.shape
        error = (got.double() - expected).norm()
        allowed = 2 * (torchs.double() - expected).norm()
        assert error <= allowed + 1e-6 * expected.norm() + 1e-12, float(error / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    (B, H, W), N, D, window, shift, form = shape
    qkv = torch.randn(B, H, W, 3 * N * D).to(dtype)
    bias = make_bias(form, N, window)
    assert_as_exact_as_torch(qkv, bias, N, window, shift, backend=backend)


@pytest.mark.parametrize(
    ("side", "window", "programs"), [((4, 10), (2, 2), 4), ((9, 24), (9, 8), 12)], ids=str
)
def test_several_windows_in_a_program(
    side: tuple[int, int],
    window: tuple[int, int],
    programs: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of the bias's gradient, some programs with a window more than others."""
    if backend == "triton":
        from simmim_kernels.window_attention import triton_kernel

        monkeypatch.setattr(triton_kernel, "PROGRAMS", programs)
    qkv, bias = torch.randn(1, *side, 3 * 16), make_bias("table", 1, window)
    assert_as_exact_as_torch(qkv, bias, 1, window, (1, 1), backend=backend)


@pytest.mark.parametrize(("window", "shift"), [((6, 6), (3, 3)), ((9, 8), (0, 4))], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(
    sign: int, window: tuple[int, int], shift: tuple[int, int], backend: str
) -> None:
    """Scores of ±80 leave the range of exp in float32 unless the largest is subtracted first."""
    h, w = window
    qkv = torch.randn(1, h, 2 * w, 3 * 16)
    qkv[..., :32] = qkv[..., :32].abs().sqrt()
    qkv[..., :16] *= sign * 80 / 14
    assert_as_exact_as_torch(qkv, make_bias("table", 1, window), 1, window, shift, backend=backend)
    assert_as_exact_as_torch(qkv.half(), None, 1, window, shift, backend=backend)


def test_scale_and_integer_sides(backend: str) -> None:
    qkv = torch.randn(1, 4, 8, 3 * 16)
    found = window_attention(qkv, None, 1, 4, 2, scale=0.7, backend=backend)
    expected = window_attention(qkv, None, 1, (4, 4), (2, 2), scale=0.7, backend="reference")
    torch.testing.assert_close(found, expected)


def test_strided_inputs(backend: str) -> None:
    """A map in another memory format, and a bias that is a transposed view."""
    qkv = torch.randn(1, 3 * 16, 4, 4).permute(0, 2, 3, 1)
    bias = torch.randn(1, 4, 4).transpose(1, 2)
    grad = torch.randn(1, 4, 16, 4).transpose(2, 3)
    found, expected = (
        out_and_gradients(
            lambda q, b, name=name: window_attention(q, b, 1, 2, 1, backend=name), qkv, bias, grad
        )
        for name in (backend, "reference")
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_bias_in_half_precision(backend: str) -> None:
    qkv = torch.randn(1, 4, 4, 3 * 16).bfloat16()
    bias = make_bias("table", 1, (4, 4)).bfloat16()
    assert_as_exact_as_torch(qkv, bias, 1, (4, 4), (0, 0), backend=backend)


@pytest.mark.parametrize("window", [(2, 3), (9, 8)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_no_images(window: tuple[int, int], backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's attention gives the bias no gradient here")
    qkv, bias = torch.randn(0, 18, 24, 3 * 16), make_bias("pairs", 1, window)
    found = out_and_gradients(
        lambda q, b: window_attention(q, b, 1, window, 1, backend=backend),
        qkv,
        bias,
        torch.empty(0, 18, 24, 16),
    )
    assert [t.shape for t in found] == [(0, 18, 24, 16), qkv.shape, bias.shape]
    assert (found[2] == 0).all()


@pytest.mark.parametrize("window", [(3, 2), (9, 8)], ids=str)
def test_frozen_parts_get_no_gradient(window: tuple[int, int], backend: str) -> None:
    h, w = window
    qkv, bias = torch.randn(1, h, w, 3 * 16), make_bias("pairs", 1, window)
    grad = torch.randn(1, h, w, 16)

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return window_attention(qkv, bias, 1, window, backend=backend)

    expected = out_and_gradients(attend, qkv, bias, grad)
    for wanted in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(is_wanted) for t, is_wanted in zip((qkv, bias), wanted)]
        attend(*leaves).backward(grad)
        for leaf, is_wanted, gradient in zip(leaves, wanted, expected[1:]):
            if is_wanted:
                torch.testing.assert_close(leaf.grad, gradient)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("window", [(4, 2), (9, 8)], ids=str)
def test_gradient_of_the_bias_is_reproducible(window: tuple[int, int], backend: str) -> None:
    h, w = window
    qkv, bias = torch.randn(2, h, w, 3 * 16).bfloat16(), make_bias("table", 1, window)
    grad = torch.randn(2, h, w, 16)
    first, second = (
        out_and_gradients(
            lambda q, b: window_attention(q, b, 1, window, backend=backend), qkv, bias, grad
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_relative_position_bias() -> None:
    """The published gather by relative_position_index."""
    h, w, N = 3, 4, 2
    table = torch.randn((2 * h - 1) * (2 * w - 1), N)
    rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
    down = rows[:, None] - rows[None, :] + h - 1
    right = columns[:, None] - columns[None, :] + w - 1
    expected = table[down * (2 * w - 1) + right].permute(2, 0, 1)
    assert torch.equal(relative_position_bias(table, (h, w)), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
def test_opcheck(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    qkv, bias = torch.randn(1, 2, 4, 3 * 16), torch.randn(1, 4, 4)
    grad = torch.randn(1, 2, 4, 16)
    for pairs in (bias.clone().requires_grad_(), None):
        arguments = (qkv.clone().requires_grad_(), pairs, 1, [2, 2], [0, 1], 0.25, backend)
        torch.library.opcheck(torch.ops.simmim.window_attention.default, arguments)
    for pairs, of_bias in ((bias, True), (bias, False), (None, False)):
        settings = (1, [2, 2], [0, 1], 0.25)
        out, log_sums = torch.ops.simmim.window_attention(qkv, pairs, *settings, backend)
        torch.library.opcheck(
            torch.ops.simmim.window_attention_backward.default,
            (grad, qkv, pairs, out, log_sums, *settings, of_bias, backend),
        )


def test_second_order_gradients_are_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference has gradients of every order")
    qkv = torch.randn(1, 2, 2, 3 * 16, requires_grad=True)
    out = window_attention(qkv, None, 1, 2, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order only"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(4, 4, 48)}, r"expected qkv \[B, H, W, 3C\].*qkv \(4, 4, 48\)"),
        ({"num_heads": 3}, "num_heads dividing C.*num_heads 3"),
        ({"num_heads": 0}, "num_heads dividing C"),
        ({"window": 3}, r"must divide the feature map.*window \(3, 3\)"),
        ({"window": (2, 0)}, r"must divide.*window \(2, 0\)"),
        ({"shift": 2}, r"shift must be below.*shift \(2, 2\)"),
        ({"shift": (0, -1)}, r"shift must be below.*shift \(0, -1\)"),
        ({"bias": torch.zeros(9, 1)}, r"expected a bias of.*bias \(9, 1\)"),
        ({"bias": torch.zeros(2, 4, 3)}, r"expected a bias of.*bias \(2, 4, 3\)"),
        ({"bias": torch.zeros(2, 4, 4).half()}, "must be float32 or of the dtype of qkv"),
        ({"qkv": torch.zeros(1, 4, 4, 48, dtype=torch.int32)}, "floating point"),
        ({"backend": "fast"}, "it has triton, native, reference"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    arguments = {
        "qkv": torch.zeros(1, 4, 4, 48).bfloat16(),
        "bias": torch.zeros(2, 4, 4),
        "num_heads": 2,
        "window": 2,
        "shift": 1,
    } | change
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)
