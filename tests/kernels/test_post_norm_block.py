"""Branches that are normalised before they are added: every backend against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_no_worse, relative_error
from simmim_kernels.dtypes import product_dtype
from simmim_kernels.post_norm_block import post_norm_attention, post_norm_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens of an image, C, M; the first tensor has one image, the others two
MLP_SHAPES = [((1,), 24, 96), ((7,), 100, 52), ((9, 7), 32, 130)]
# B, (H, W), C, heads, window, shift
ATTENTION_SHAPES = [
    (1, (7, 9), 24, 3, (7, 3), (0, 0)),
    (2, (4, 3), 96, 3, (2, 3), (1, 1)),
    (3, (1, 7), 100, 5, (1, 7), (0, 0)),
    (1, (9, 8), 32, 2, (9, 8), (0, 0)),
]
SMALL_MLP, SMALL_ATTENTION = MLP_SHAPES[1], (2, (4, 3), 8, 2, (2, 3), (1, 1))

Inputs = dict[str, Tensor]


def mlp_inputs(shape: tuple, scaled: bool = True, offset: float = 1.0) -> Inputs:
    tokens, C, M = shape
    B = 1 if tokens == (1,) else 2
    inputs = {
        "x": torch.randn(B, *tokens, C) * 2 + offset,
        "fc1_weight": torch.randn(M, C) / C**0.5,
        "fc1_bias": torch.randn(M),
        "fc2_weight": torch.randn(C, M) / M**0.5,
        "fc2_bias": torch.randn(C),
        "norm_weight": torch.rand(C) + 0.5,
        "norm_bias": torch.randn(C),
    }
    return inputs | ({"branch_scale": torch.tensor([1.25, 0.0])[:B]} if scaled else {})


def attention_inputs(shape: tuple, full: bool = True) -> tuple[Inputs, dict[str, Any]]:
    B, (H, W), C, num_heads, window, shift = shape
    pairs = window[0] * window[1]
    inputs = {
        "x": torch.randn(B, H, W, C) * 2 + 1,
        "qkv_weight": torch.randn(3 * C, C) / C**0.5,
        "logit_scale": torch.linspace(2.5, 0.0, num_heads),
        "proj_weight": torch.randn(C, C) / C**0.5,
        "proj_bias": torch.randn(C),
        "norm_weight": torch.rand(C) + 0.5,
        "norm_bias": torch.randn(C),
    }
    if full:
        inputs["qkv_bias"] = torch.randn(3 * C)
        inputs["bias"] = torch.randn(num_heads, pairs, pairs)
        inputs["branch_scale"] = torch.tensor([1.25, 0.0, 1.25])[:B]
    return inputs, {"num_heads": num_heads, "window": window, "shift": shift}


def attend(inputs: Inputs, **options: Any) -> Tensor:
    return post_norm_attention(**{"qkv_bias": None, "bias": None} | inputs, **options)


def mlp(inputs: Inputs, **options: Any) -> Tensor:
    return post_norm_mlp(**inputs, **options)


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
    function: Callable[..., Tensor],
    inputs: Inputs,
    dtype: torch.dtype,
    backend: str,
    **options: Any,
) -> None:
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    wide = {name: t.double() for name, t in inputs.items()}
    exact = gradients(function, wide, backend="reference", **options)
    plain = gradients(function, inputs, backend="reference", **options)
    found = gradients(function, inputs, backend=backend, **options)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in plain.items()}
    if "logit_scale" in found:  # few numbers, sums of much that cancels: luck
        one, *_, other = (tensors.pop("logit_scale") for tensors in (found, plain, exact))
        assert relative_error(one, other) < (1e-4 if dtype == torch.float32 else 0.2)
    assert_no_worse(found, plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_mlp_against_float64(shape: tuple, scaled: bool, dtype: torch.dtype, backend: str) -> None:
    assert_as_exact_as_torch(mlp, mlp_inputs(shape, scaled), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_attention_against_float64(
    shape: tuple, full: bool, dtype: torch.dtype, backend: str
) -> None:
    inputs, settings = attention_inputs(shape, full)
    assert_as_exact_as_torch(attend, inputs, dtype, backend, **settings)


def test_a_large_mean_costs_no_digits(backend: str) -> None:
    """The variance as a difference of two sums would lose ten bits here."""
    inputs = mlp_inputs(((9,), 24, 40))
    inputs["fc2_bias"] += 100
    assert_as_exact_as_torch(mlp, inputs, torch.float32, backend)


def test_a_dropped_branch_is_nothing_and_gets_nothing(backend: str) -> None:
    for function, (inputs, options) in (
        (mlp, (mlp_inputs(SMALL_MLP), {})),
        (attend, attention_inputs(SMALL_ATTENTION)),
    ):
        inputs["branch_scale"] = torch.zeros(2)
        found = gradients(function, inputs, backend=backend, **options)
        assert torch.equal(found.pop("out"), inputs["x"])
        assert found.pop("x").any()
        assert not any(gradient.any() for gradient in found.values())


def test_frozen_parts_get_no_gradient(backend: str) -> None:
    for function, (inputs, options) in (
        (mlp, (mlp_inputs(SMALL_MLP), {})),
        (attend, attention_inputs(SMALL_ATTENTION)),
    ):
        expected = gradients(function, inputs, backend=backend, **options)
        leaves = {name: t.clone().requires_grad_(name == "x") for name, t in inputs.items()}
        out = function(leaves, backend=backend, **options)
        out.backward(torch.linspace(-1, 1.5, out.numel()).view(out.shape).sin())
        torch.testing.assert_close(leaves["x"].grad, expected["x"])
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != "x")


def test_autocast_keeps_parameters_wide(backend: str) -> None:
    for function, (inputs, options) in (
        (mlp, (mlp_inputs(SMALL_MLP), {})),
        (attend, attention_inputs(SMALL_ATTENTION)),
    ):
        exact = gradients(
            function, {n: t.double() for n, t in inputs.items()}, backend="reference", **options
        )
        plain, found = (
            gradients(
                lambda leaves, f=function, n=name, o=options: under_autocast(f, leaves, n, o),
                inputs,
            )
            for name in ("reference", backend)
        )
        assert found["out"].dtype == torch.bfloat16
        assert {found[name].dtype for name in found if name != "out"} == {torch.float32}
        for tensors in (found, plain, exact):
            tensors.pop("logit_scale", None)
        assert_no_worse(found, plain, exact, torch.bfloat16)


def under_autocast(
    function: Callable[..., Tensor], leaves: Inputs, backend: str, options: dict[str, Any]
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return function(leaves, backend=backend, **options)


def test_no_images(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's attention gives the bias no gradient here")
    for function, (inputs, options) in (
        (mlp, (mlp_inputs(SMALL_MLP), {})),
        (attend, attention_inputs(SMALL_ATTENTION)),
    ):
        inputs["x"], inputs["branch_scale"] = inputs["x"][:0], inputs["branch_scale"][:0]
        found = gradients(function, inputs, backend=backend, **options)
        assert found.pop("out").shape == found.pop("x").shape == inputs["x"].shape
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
def test_opcheck(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    ops, dtype = torch.ops.simmim, product_dtype(backend, torch.float32)
    inputs, settings = attention_inputs(SMALL_ATTENTION)
    names = ("x", "qkv_weight", "qkv_bias", "logit_scale", "bias", "proj_weight", "proj_bias")
    tensors = [inputs[name] for name in (*names, "norm_weight", "norm_bias", "branch_scale")]
    places = (settings["num_heads"], list(settings["window"]), list(settings["shift"]))
    tensors[3] = tensors[3].exp()
    leaves = [t.clone().requires_grad_() for t in tensors[:-1]]
    assert leaves[1].dtype == dtype
    arguments = (*leaves, tensors[-1], *places, 1e-5, backend)
    torch.library.opcheck(ops.post_norm_attention.default, arguments)
    out, *kept = ops.post_norm_attention(*tensors, *places, 1e-5, backend)
    for of_parameters in (True, False):
        arguments = (torch.ones_like(out), *tensors, *kept, *places, of_parameters, backend)
        torch.library.opcheck(ops.post_norm_attention_backward.default, arguments)

    tensors = list(mlp_inputs(SMALL_MLP).values())
    leaves = [t.clone().requires_grad_() for t in tensors[:-1]]
    torch.library.opcheck(ops.post_norm_mlp.default, (*leaves, tensors[-1], 1e-5, backend))
    out, *kept = ops.post_norm_mlp(*tensors, 1e-5, backend)
    for of_parameters in (True, False):
        arguments = (torch.ones_like(out), *tensors, *kept, of_parameters, backend)
        torch.library.opcheck(ops.post_norm_mlp_backward.default, arguments)


def test_second_order_gradients_are_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference has gradients of every order")
    inputs = mlp_inputs(SMALL_MLP)
    x = inputs["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(
        mlp(inputs, backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="first order only"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3, 8)}, r"expected x \[B, H, W, C\].*x \(4, 3, 8\)"),
        ({"num_heads": 3}, "num_heads dividing C.*num_heads 3"),
        ({"window": 3}, r"must divide the feature map.*window \(3, 3\)"),
        ({"qkv_weight": torch.zeros(8, 8)}, r"expected qkv_weight \[3C, C\].*\(8, 8\)"),
        ({"qkv_bias": torch.zeros(8)}, r"expected qkv_bias \[3C\]"),
        ({"logit_scale": torch.zeros(2, 1, 1)}, r"expected logit_scale \[N\].*\(2, 1, 1\)"),
        ({"norm_weight": torch.zeros(7)}, r"norm_weight and norm_bias must be \[C\]"),
        ({"branch_scale": torch.zeros(3)}, r"expected branch_scale \[B\]"),
        ({"bias": torch.zeros(2, 4, 4)}, r"expected a bias of.*bias \(2, 4, 4\)"),
        ({"proj_bias": torch.zeros(8).half()}, "of their dtype or float32"),
        ({"backend": "fast"}, "it has triton, native, reference"),
    ],
)
def test_wrong_arguments_of_attention(change: dict, message: str) -> None:
    inputs, settings = attention_inputs(SMALL_ATTENTION)
    with pytest.raises(ValueError, match=message):
        attend(
            **{"inputs": inputs | {k: v for k, v in change.items() if k in ARGUMENTS}},
            **settings | {k: v for k, v in change.items() if k not in ARGUMENTS},
        )


ARGUMENTS = {*attention_inputs(SMALL_ATTENTION)[0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(100)}, r"expected x \[B, …, C\]"),
        ({"fc1_bias": torch.zeros(3)}, r"expected fc1_weight \[M, C\], fc1_bias \[M\]"),
        ({"fc2_bias": torch.zeros(3)}, r"must be \[C\].*fc2_bias \(3,\)"),
        ({"branch_scale": torch.zeros(3)}, r"expected branch_scale \[B\]"),
        ({"x": torch.zeros(2, 7, 100, dtype=torch.int32)}, "expected floating point"),
    ],
)
def test_wrong_arguments_of_the_mlp(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(mlp_inputs(SMALL_MLP) | change)


def test_xformers_has_no_cosines() -> None:
    inputs, settings = attention_inputs(SMALL_ATTENTION)
    with pytest.raises(RuntimeError, match="xformers has no attention by cosines"):
        attend(inputs, backend="xformers", **settings)
