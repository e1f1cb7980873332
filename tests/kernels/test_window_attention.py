"""window_attention: (shifted) windows of a feature map, by every backend."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.window_attention import (
    LARGEST_LOGIT_SCALE,
    relative_position_bias,
    window_attention,
)

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

# Every shape in every dtype by the kernels whose way depends on both; by the others, which are the
# same source for other instruction sets, or compared with themselves, in one dtype each.
BACKENDS = ("reference", "native-avx2", "native-baseline", "native", "triton-interpreted")
EVERY_SHAPE = pytest.mark.parametrize(
    ("shape", "dtype", "backend"),
    [
        (shape, dtype, backend)
        for k, backend in enumerate(BACKENDS)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
        if backend in ("native", "triton-interpreted") or (i + j + k) % 3 == 0
    ],
    ids=str,
    indirect=["backend"],
)


def make_bias(form: str, num_heads: int, window: tuple[int, int]) -> Tensor | None:
    h, w = window
    if form == "table":
        return torch.randn((2 * h - 1) * (2 * w - 1), num_heads)
    return torch.randn(num_heads, h * w, h * w) if form == "pairs" else None


def out_and_gradients(
    function: Callable[..., Tensor],
    qkv: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    logit_scale: Tensor | None = None,
) -> list[Tensor]:
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (qkv, bias, logit_scale)
    ]
    out = function(*leaves) if logit_scale is not None else function(*leaves[:2])
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def with_lengths(qkv: Tensor, logit_scale: Tensor) -> Tensor:
    """qkv whose q·k are the scores of cosines, in its own dtype: the reference leaves that."""
    q, k, v = qkv.unflatten(-1, (3, len(logit_scale), -1)).unbind(-3)
    factors = logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp().to(qkv.dtype)
    q = F.normalize(q, dim=-1) * factors.unsqueeze(1)
    return torch.stack((q, F.normalize(k, dim=-1), v), dim=-3).flatten(-3)


def sum_of_parts(
    qkv: Tensor, bias: Tensor | None, num_heads: int, places: tuple, factors: Tensor, grad: Tensor
) -> Tensor:
    """Of the gradient of every logit_scale [N], which is a sum over tokens: that of their amounts.

    The sum itself may be anything below, and its error is that of its parts.
    """
    unit = with_lengths(qkv, factors).requires_grad_()
    attend = partial(window_attention, scale=1.0, backend="reference")
    attend(unit, bias, num_heads, *places).backward(grad.to(unit.dtype))
    of_q = (unit.grad * unit).detach().unflatten(-1, (3, num_heads, -1))[..., 0, :, :]
    return of_q.sum(-1).abs().sum((0, 1, 2))


def assert_as_exact_as_torch(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    *places: tuple[int, int],
    backend: str,
    logit_scale: Tensor | None = None,
    tiny: float = 1e-6,
) -> None:
    """At most twice the error of PyTorch in the dtype of qkv; truth is the reference in float64."""
    grad = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3).to(qkv.dtype)

    def run(name: str, *inputs: Tensor | None) -> list[Tensor]:
        def attend(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None = None) -> Tensor:
            if name == "plain" and logit_scale is not None:
                qkv, options = with_lengths(qkv, logit_scale), {"scale": 1.0}
            else:
                options = {"logit_scale": logit_scale}
            backend = "reference" if name == "plain" else name
            return window_attention(qkv, bias, num_heads, *places, **options, backend=backend)

        return out_and_gradients(attend, *inputs[:2], grad, *inputs[2:])

    inputs = qkv, bias, logit_scale
    wide = [None if t is None else t.double() for t in inputs]
    exact, plain, found = run("reference", *wide), run("plain", *inputs), run(backend, *inputs)
    # of a window of one token some gradients are 0: what is left is rounding of parts that cancel
    rest = 0.01 * torch.finfo(qkv.dtype).eps * float(grad.norm())
    tiny = [tiny * float(expected.norm()) + rest for expected in exact]
    if logit_scale is not None:
        parts = sum_of_parts(*wide[:2], num_heads, places, wide[2], grad)
        tiny[-1] += 4 * torch.finfo(qkv.dtype).eps * float(parts.norm())
    for got, expected, torchs, beyond in zip(found, exact, plain, tiny, strict=True):
        assert got.dtype == torchs.dtype
        assert got.shape == expected.shape
        error = (got.double() - expected).norm()
        allowed = 2 * (torchs.double() - expected).norm()
        assert error <= allowed + beyond, float(error / expected.norm())


@EVERY_SHAPE
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    (B, H, W), N, D, window, shift, form = shape
    qkv = torch.randn(B, H, W, 3 * N * D).to(dtype)
    bias = make_bias(form, N, window)
    assert_as_exact_as_torch(qkv, bias, N, window, shift, backend=backend)


@EVERY_SHAPE
@pytest.mark.usefixtures("poisoned_empty")
def test_cosines_against_float64(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    """Factors of 1 to 33, and lengths of q and k that have nothing to do with one another."""
    (B, H, W), N, D, window, shift, form = shape
    lengths = torch.tensor([3.0, 0.2, 1.0]).repeat_interleave(N * D)
    qkv = (torch.randn(B, H, W, 3 * N * D) * lengths).to(dtype)
    logit_scale = torch.linspace(3.5, 0.0, N + 1)[:N]
    bias = make_bias(form, N, window)
    assert_as_exact_as_torch(qkv, bias, N, window, shift, backend=backend, logit_scale=logit_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(6, 6), (9, 8)], ids=str)
def test_largest_factor(window: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """In float32 a statistic of about 100 is off by 4e-6, and with it all gradients of its row."""
    h, w = window
    qkv, bias = torch.randn(1, h, 2 * w, 3 * 16).to(dtype), 16 * torch.rand(1, h * w, h * w)
    assert_as_exact_as_torch(
        qkv, bias, 1, window, (1, 1), backend=backend, logit_scale=torch.tensor([5.0]), tiny=5e-6
    )


@pytest.mark.parametrize("window", [(4, 2), (9, 8)], ids=str)
def test_nothing_is_learned_above_the_largest_factor(window: tuple[int, int], backend: str) -> None:
    qkv, grad = torch.randn(1, *window, 3 * 32), torch.randn(1, *window, 32)

    def attend(qkv: Tensor, bias: None, logit_scale: Tensor) -> Tensor:
        return window_attention(qkv, None, 2, window, logit_scale=logit_scale, backend=backend)

    above = out_and_gradients(attend, qkv, None, grad, torch.tensor([4.7, 1.0]))
    far_above = out_and_gradients(attend, qkv, None, grad, torch.tensor([10.0, 1.0]))
    for one, other in zip(above, far_above, strict=True):
        assert torch.equal(one, other)
    assert above[2][0] == 0
    assert above[2][1] != 0


@pytest.mark.parametrize("window", [(4, 2), (9, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosines_of_nothing(window: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """A zero has no direction, and one shorter than 1e-12 is divided by that."""
    h, w = window
    qkv = torch.randn(1, h, w, 3, 16)
    qkv[0, 0, 0, 0], qkv[0, 1, 1, 1] = 0, 0
    qkv[0, 1, 0, :2] *= 1e-14
    grad = torch.randn(1, h, w, 16).to(dtype)
    qkv = qkv.to(dtype).flatten(3)
    bias, logit_scale = torch.randn(1, h * w, h * w), torch.tensor([2.0])

    def run(name: str, wide: torch.dtype) -> list[Tensor]:
        def attend(qkv: Tensor, bias: Tensor, logit_scale: Tensor) -> Tensor:
            return window_attention(qkv, bias, 1, window, logit_scale=logit_scale, backend=name)

        given = [t.to(wide) if wide == torch.float64 else t for t in (qkv, bias, logit_scale)]
        return out_and_gradients(attend, *given[:2], grad, given[2])

    found, exact = run(backend, dtype), run("reference", torch.float64)
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    vanishing = torch.zeros(1, h, w, 48, dtype=torch.bool)
    vanishing[0, 0, 0, :16], vanishing[0, 1, 1, 16:32], vanishing[0, 1, 0, :32] = True, True, True
    for part in (vanishing, ~vanishing):  # gradients of the former are 1e12 times as large
        scale = exact[1][part].abs().max()
        assert (found[1] - exact[1])[part].abs().max() <= rtol * scale
    for got, expected in zip((found[0], *found[2:]), (exact[0], *exact[2:]), strict=True):
        assert (got - expected).norm() <= rtol * expected.norm()


def test_xformers_has_no_cosines() -> None:
    with pytest.raises(RuntimeError, match="xformers has no attention by cosines"):
        window_attention(
            torch.zeros(1, 2, 2, 48), None, 1, 2, logit_scale=torch.zeros(1), backend="xformers"
        )


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
    for logit_scale in (None, torch.tensor([2.0])):
        assert_as_exact_as_torch(
            qkv, bias, 1, window, (1, 1), backend=backend, logit_scale=logit_scale
        )


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
    for logit_scale in (None, torch.zeros(1)):
        found = out_and_gradients(
            lambda q, b, s=None: window_attention(
                q, b, 1, window, 1, logit_scale=s, backend=backend
            ),
            qkv,
            bias,
            torch.empty(0, 18, 24, 16),
            logit_scale,
        )
        assert [t.shape for t in found[:3]] == [(0, 18, 24, 16), qkv.shape, bias.shape]
        assert all((gradient == 0).all() for gradient in found[2:])


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
    for logit_scale in (None, torch.zeros(1)):
        first, second = (
            out_and_gradients(
                lambda q, b, s=None: window_attention(
                    q, b, 1, window, logit_scale=s, backend=backend
                ),
                qkv,
                bias,
                grad,
                logit_scale,
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
