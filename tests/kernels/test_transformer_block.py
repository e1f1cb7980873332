"""The residual branches of a transformer block: every backend against the reference in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_no_worse, relative_error
from simmim_kernels.transformer_block import product_dtype, residual_attention, residual_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What a branch may do without: "full" has all of it, "plain" nothing.
OPTIONS = ["plain", "full", "gamma", "branch_scale"]
MATRICES = {"x", "qkv_weight", "proj_weight", "fc1_weight", "fc2_weight"}
# tokens of an image, C, M; the first tensor has one image, the others two
MLP_SHAPES = [((1,), 24, 96), ((7,), 100, 52), ((9, 7), 32, 130)]
# B, (H, W), C, heads, window, shift
ATTENTION_SHAPES = [
    (1, (7, 9), 24, 3, (7, 3), (0, 0)),
    (2, (4, 3), 96, 3, (2, 3), (1, 1)),
    (3, (1, 7), 100, 5, (1, 7), (0, 0)),
]
SMALL_ATTENTION = (2, (4, 3), 8, 2, (2, 3), (1, 1))

Inputs = dict[str, Tensor]


def finish(inputs: Inputs, option: str, dtype: torch.dtype) -> Inputs:
    if option in ("plain", "branch_scale"):
        del inputs["gamma"]
    if option in ("plain", "gamma"):
        del inputs["branch_scale"]
    return {name: t.to(dtype) for name, t in inputs.items()}


def mlp_inputs(shape: tuple, option: str, dtype: torch.dtype, offset: float = 1.0) -> Inputs:
    tokens, C, M = shape
    B = 1 if tokens == (1,) else 2
    inputs = {
        "x": torch.randn(B, *tokens, C) * 2 + offset,
        "norm_weight": torch.rand(C) + 0.5,
        "norm_bias": torch.randn(C),
        "fc1_weight": torch.randn(M, C) / C**0.5,
        "fc1_bias": torch.randn(M),
        "fc2_weight": torch.randn(C, M) / M**0.5,
        "fc2_bias": torch.randn(C),
        "gamma": torch.randn(C) * 0.1,
        "branch_scale": torch.tensor([1.25, 0.0])[:B],
    }
    return finish(inputs, option, dtype)


def attention_inputs(shape: tuple, option: str, dtype: torch.dtype) -> tuple[Inputs, dict]:
    B, (H, W), C, num_heads, window, shift = shape
    pairs = window[0] * window[1]
    inputs = {
        "x": torch.randn(B, H, W, C) * 2 + 1,
        "norm_weight": torch.rand(C) + 0.5,
        "norm_bias": torch.randn(C),
        "qkv_weight": torch.randn(3 * C, C) / C**0.5,
        "qkv_bias": torch.randn(3 * C),
        "bias": torch.randn(num_heads, pairs, pairs),
        "proj_weight": torch.randn(C, C) / C**0.5,
        "proj_bias": torch.randn(C),
        "gamma": torch.randn(C) * 0.1,
        "branch_scale": torch.tensor([1.25, 0.0, 1.25])[:B],
    }
    inputs = finish(inputs, option, dtype)
    if option == "plain":
        del inputs["qkv_bias"], inputs["bias"]
    return inputs, {"num_heads": num_heads, "window": window, "shift": shift}


def attend(inputs: Inputs, **options: Any) -> Tensor:
    return residual_attention(**{"qkv_bias": None, "bias": None} | inputs, **options)


def mlp(inputs: Inputs, **options: Any) -> Tensor:
    return residual_mlp(**inputs, **options)


def gradients(function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Inputs:
    """The output, and the gradient of all that may have one."""
    leaves = {
        name: t.detach().clone().requires_grad_(name != "branch_scale")
        for name, t in inputs.items()
    }
    out = function(leaves, **options)
    out.backward(torch.linspace(-1, 1.5, out.numel()).view(out.shape).sin().to(out.dtype))
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"out": out.detach()} | found


def assert_as_exact_as_torch(
    function: Callable[..., Tensor], inputs: Inputs, backend: str, **options: Any
) -> None:
    wide = {name: t.double() for name, t in inputs.items()}
    exact = gradients(function, wide, backend="reference", **options)
    plain = gradients(function, inputs, backend="reference", **options)
    found = gradients(function, inputs, backend=backend, **options)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in plain.items()}
    assert_no_worse(found, plain, exact, inputs["x"].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_mlp_against_float64(shape: tuple, option: str, dtype: torch.dtype, backend: str) -> None:
    assert_as_exact_as_torch(mlp, mlp_inputs(shape, option, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("option", "shape"),
    [
        ("full", ATTENTION_SHAPES[0]),
        ("plain", ATTENTION_SHAPES[1]),
        ("full", ATTENTION_SHAPES[1]),
        ("full", ATTENTION_SHAPES[2]),
        *((option, SMALL_ATTENTION) for option in OPTIONS),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_attention_against_float64(
    shape: tuple, option: str, dtype: torch.dtype, backend: str
) -> None:
    inputs, settings = attention_inputs(shape, option, dtype)
    assert_as_exact_as_torch(attend, inputs, backend, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_digits(dtype: torch.dtype, backend: str) -> None:
    """The variance as a difference of two sums would lose ten bits here."""
    assert_as_exact_as_torch(mlp, mlp_inputs(((9,), 24, 40), "plain", dtype, 100.0), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_rows(dtype: torch.dtype, backend: str) -> None:
    """More tokens than one program or thread takes."""
    assert_as_exact_as_torch(mlp, mlp_inputs(((75,), 16, 40), "full", dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_every_16_bit_value(dtype: torch.dtype, backend: str) -> None:
    if backend != "triton":
        pytest.skip("of the Triton rows: 16-bit results come from a shorter formula")
    from simmim_kernels.transformer_block import triton_rows

    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = torch.randn(2**12) * 0.1 if dtype == torch.float32 else x.view(dtype)
    x = x[x.isfinite()].clamp(-1e4, 1e4)
    x = x[: x.numel() // 32 * 32].view(-1, 32)
    bias = torch.zeros(32)
    out = triton_rows.gelu(x, bias)
    wide = x.double().requires_grad_()
    exact = wide * torch.special.erfc(-wide / 2**0.5) / 2
    exact.sum().backward()
    slope = torch.ones_like(x)
    again, _ = triton_rows.gelu_backward(slope, x, bias, None, True)
    assert torch.equal(out, again)
    rounding = torch.finfo(dtype).eps / 2
    for got, expected in ((out, exact.detach()), (slope, wide.grad)):
        error = (got.double() - expected).abs()
        assert (error <= 1.01 * rounding * expected.abs() + 4e-7).all()
        assert error.norm() <= rounding * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_vectors_beside_16_bit_matrices(dtype: torch.dtype, backend: str) -> None:
    inputs = mlp_inputs(((7,), 24, 40), "full", dtype)
    attention, settings = attention_inputs(SMALL_ATTENTION, "full", dtype)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        plain = gradients(function, case, backend="reference", **options)
        mixed = {k: t if k in MATRICES else t.float() for k, t in case.items()}
        wide = {k: t.double() for k, t in case.items()}
        exact = gradients(function, wide, backend="reference", **options)
        found = gradients(function, mixed, backend=backend, **options)
        for name, got in found.items():
            assert got.dtype == (dtype if name in MATRICES | {"out"} else torch.float32), name
        assert_no_worse(found, plain, exact, dtype)


def test_a_tiny_gamma_in_float16(backend: str) -> None:
    """Its products with weights are below what float16 can hold."""
    if backend == "reference":
        pytest.skip("gradients in float16 need a scaled loss")
    inputs = mlp_inputs(((9,), 24, 40), "gamma", torch.float32)
    attention, settings = attention_inputs(SMALL_ATTENTION, "gamma", torch.float32)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        case["gamma"] *= 1e-5
        wide = {k: t.double() for k, t in case.items()}
        exact = gradients(function, wide, backend="reference", **options)
        with torch.autocast("cpu", torch.float16):
            found = gradients(function, case, backend=backend, **options)
        for name in ("norm_weight", "norm_bias", "proj_bias", "fc2_bias", "gamma"):
            if name in case:
                assert relative_error(found[name], exact[name]) < 0.05, name


@pytest.mark.parametrize("option", ["plain", "full"])
def test_autocast(option: str, backend: str) -> None:
    """Parameters stay float32; the result is as exact as the reference's under autocast."""
    mlp_case = mlp_inputs(((7,), 24, 40), option, torch.float32)
    attention_case, settings = attention_inputs(SMALL_ATTENTION, option, torch.float32)
    for function, inputs, options in ((mlp, mlp_case, {}), (attend, attention_case, settings)):

        def cast(leaves: Inputs, **more: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(leaves, **more)  # noqa: B023

        wide = {k: t.double() for k, t in inputs.items()}
        exact = gradients(function, wide, backend="reference", **options)
        plain = gradients(cast, inputs, backend="reference", **options)
        found = gradients(cast, inputs, backend=backend, **options)
        assert found["out"].dtype == torch.bfloat16
        assert all(t.dtype == torch.float32 for name, t in found.items() if name != "out")
        assert_no_worse(found, plain, exact, torch.bfloat16)


def test_any_number_of_token_axes(backend: str) -> None:
    inputs = mlp_inputs(((3, 4), 24, 40), "full", torch.float32)
    expected = gradients(mlp, inputs, backend="reference")
    flat = inputs | {"x": inputs["x"].flatten(1, 2)}
    rows = inputs | {"x": inputs["x"].flatten(0, 2)}
    rows["branch_scale"] = inputs["branch_scale"].repeat_interleave(12)
    for case in (flat, rows):
        found = gradients(mlp, case, backend=backend)
        assert found["out"].shape == case["x"].shape
        for name, value in expected.items():
            torch.testing.assert_close(found[name].view(value.shape), value, rtol=1e-4, atol=1e-5)


def test_strided_tensors(backend: str) -> None:
    inputs = mlp_inputs(((6, 4), 24, 40), "full", torch.float32)
    attention, settings = attention_inputs(SMALL_ATTENTION, "full", torch.float32)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        expected = function(case, backend="reference", **options)
        strided = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in case.items()}
        assert not strided["x"].is_contiguous()
        found = function(strided, backend=backend, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_empty_batch(backend: str) -> None:
    inputs = mlp_inputs(((7,), 24, 40), "full", torch.float32)
    attention, settings = attention_inputs(SMALL_ATTENTION, "full", torch.float32)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        case["x"], case["branch_scale"] = case["x"][:0], case["branch_scale"][:0]
        found = gradients(function, case, backend=backend, **options)
        assert found["out"].shape == case["x"].shape
        for name, grad in found.items():
            if name != "out" and (backend != "reference" or grad is not None):
                assert grad.shape == case[name].shape, name
                assert (grad == 0).all(), name


def test_only_what_is_wanted_has_a_gradient(backend: str) -> None:
    inputs = mlp_inputs(((7,), 24, 40), "full", torch.float32)
    attention, settings = attention_inputs(SMALL_ATTENTION, "full", torch.float32)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        expected = gradients(function, case, backend="reference", **options)
        for wanted in ({"x"}, {"gamma", "norm_bias"}):
            leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in case.items()}
            function(leaves, backend=backend, **options).backward(
                torch.linspace(-1, 1.5, leaves["x"].numel()).view(leaves["x"].shape).sin()
            )
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in wanted), name
                if name in wanted:
                    torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_the_backward(dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    inputs = mlp_inputs(((9, 7), 32, 130), "plain", dtype)
    attention, settings = attention_inputs(ATTENTION_SHAPES[0], "full", dtype)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        leaves = {k: t.requires_grad_(k != "branch_scale") for k, t in case.items()}
        # parameters in the form in which the op gets them
        small = {tuple(t.shape) for k, t in leaves.items() if k != "x"}
        kept: dict[int, Tensor] = {}

        def keep(t: Tensor) -> Tensor:
            if tuple(t.shape) not in small:  # noqa: B023
                kept[t.data_ptr()] = t  # noqa: B023
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function(leaves, backend=backend, **options)
        C, size = case["x"].shape[-1], dtype.itemsize
        T = case["x"].numel() // C
        expected = (1 * T * C + T * 130) * size + T * 2 * 4
        if function is attend:
            expected = 5 * T * C * size + T * (2 + settings["num_heads"]) * 4
        assert sum(t.numel() * t.element_size() for t in kept.values()) == expected


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@pytest.mark.parametrize("option", ["plain", "full"])
def test_opcheck(option: str, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    ops = torch.ops.simmim
    dtype = product_dtype(backend, torch.float32)

    def tensors(inputs: Inputs, names: str) -> list[Tensor | None]:
        leaves = {k: t.to(dtype) if k in MATRICES - {"x"} else t for k, t in inputs.items()}
        for name, t in leaves.items():
            t.requires_grad_(name != "branch_scale")
        return [leaves.get(name) for name in names.split()]

    inputs = tensors(
        mlp_inputs(((3,), 8, 12), option, torch.float32),
        "x norm_weight norm_bias fc1_weight fc1_bias fc2_weight fc2_bias gamma branch_scale",
    )
    torch.library.opcheck(ops.residual_mlp.default, (*inputs, 1e-5, backend))
    inputs = [None if t is None else t.detach() for t in inputs]
    out, *kept = ops.residual_mlp(*inputs, 1e-5, backend)
    torch.library.opcheck(
        ops.residual_mlp_backward.default, (torch.ones_like(out), *inputs, *kept, True, backend)
    )

    case, _ = attention_inputs((1, (2, 3), 4, 1, (2, 3), (1, 1)), option, torch.float32)
    names = "x norm_weight norm_bias qkv_weight qkv_bias bias proj_weight proj_bias gamma"
    inputs = tensors(case, f"{names} branch_scale")
    settings = (1, [2, 3], [1, 1], 0.5)
    torch.library.opcheck(ops.residual_attention.default, (*inputs, *settings, 1e-5, backend))
    inputs = [None if t is None else t.detach() for t in inputs]
    out, *kept = ops.residual_attention(*inputs, *settings, 1e-5, backend)
    torch.library.opcheck(
        ops.residual_attention_backward.default,
        (torch.ones_like(out), *inputs, *kept, *settings, True, backend),
    )


def test_second_order_is_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference has gradients of any order")
    inputs = mlp_inputs(((3,), 8, 12), "plain", torch.float32)
    attention, settings = attention_inputs(SMALL_ATTENTION, "plain", torch.float32)
    for function, case, options in ((mlp, inputs, {}), (attend, attention, settings)):
        case["x"].requires_grad_()
        out = function(case, backend=backend, **options)
        (gradient,) = torch.autograd.grad(out.square().sum(), case["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match="first order only"):
            gradient.sum().backward()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": zeros(8)}, r"x \(8,\)"),
        ({"fc1_weight": zeros(12, 7)}, r"fc1_weight \(12, 7\)"),
        ({"fc2_weight": zeros(12, 8)}, r"fc2_weight \[C, M\]: .*fc2_weight \(12, 8\)"),
        ({"fc1_bias": zeros(8)}, r"fc1_bias \(8,\)"),
        ({"fc2_bias": zeros(12)}, r"fc2_bias \(12,\)"),
        ({"norm_weight": zeros(7)}, r"norm_weight \(7,\)"),
        ({"gamma": zeros(1)}, r"gamma \(1,\)"),
        ({"branch_scale": zeros(3)}, r"expected branch_scale \[B\]"),
        ({"x": zeros(2, 3, 8).long()}, "floating point"),
        ({"fc1_bias": zeros(12).bfloat16()}, "of their dtype or float32"),
        ({"fc1_bias": torch.zeros(12, device="meta")}, "on the activations' device"),
        ({"backend": "fast"}, "it has triton, native, reference"),
    ],
)
def test_wrong_arguments_of_mlp(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_mlp(**mlp_inputs(((3,), 8, 12), "plain", torch.float32) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": zeros(2, 12, 8)}, r"x \(2, 12, 8\)"),
        ({"num_heads": 3}, "num_heads dividing C: .*num_heads 3"),
        ({"window": (3, 3)}, r"divide the feature map.*window \(3, 3\)"),
        ({"shift": (0, 3)}, "below the window"),
        ({"qkv_weight": zeros(8, 24)}, r"qkv_weight \(8, 24\)"),
        ({"proj_weight": zeros(8, 9)}, r"proj_weight \(8, 9\)"),
        ({"qkv_bias": zeros(8)}, r"qkv_bias \(8,\)"),
        ({"bias": zeros(2, 5, 6)}, r"bias \(2, 5, 6\)"),
        ({"proj_bias": zeros(9)}, r"proj_bias \(9,\)"),
        ({"gamma": zeros(9)}, r"gamma \(9,\)"),
        ({"branch_scale": zeros(24)}, r"expected branch_scale \[B\]"),
        ({"backend": "fast"}, "it has triton, native, reference"),
    ],
)
def test_wrong_arguments_of_attention(change: dict, message: str) -> None:
    inputs, settings = attention_inputs(SMALL_ATTENTION, "full", torch.float32)
    with pytest.raises(ValueError, match=message):
        residual_attention(**inputs | settings | change)


def test_a_table_of_relative_positions(backend: str) -> None:
    inputs, settings = attention_inputs(SMALL_ATTENTION, "full", torch.float32)
    h, w = settings["window"]
    inputs["bias"] = torch.randn((2 * h - 1) * (2 * w - 1), settings["num_heads"])
    expected = gradients(attend, inputs, backend="reference", **settings)
    found = gradients(attend, inputs, backend=backend, **settings)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
