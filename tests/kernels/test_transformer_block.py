"""The residual branches of a transformer block: every backend against the reference in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_no_worse, relative_error
from op_samples import Inputs, attention_inputs, mlp_inputs, wave
from simmim_kernels import post_norm_attention, post_norm_mlp, residual_attention, residual_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATRICES = {"x", "qkv_weight", "proj_weight", "fc1_weight", "fc2_weight"}
BRANCHES = {
    f.__name__: f for f in (residual_attention, residual_mlp, post_norm_attention, post_norm_mlp)
}
EVERY_BRANCH = pytest.mark.parametrize("branch", BRANCHES)
# tokens of an image, C, M; the first tensor has one image, the others two
MLP_SHAPES = [((1,), 24, 96), ((7,), 100, 52), ((9, 7), 32, 130)]
# B, (H, W), C, heads, window, shift
ATTENTION_SHAPES = [
    (1, (7, 9), 24, 3, (7, 3), (0, 0)),
    (2, (4, 3), 96, 3, (2, 3), (1, 1)),
    (3, (1, 7), 100, 5, (1, 7), (0, 0)),
    (1, (9, 8), 32, 2, (9, 8), (0, 0)),
]
SMALL_ATTENTION, SMALL_MLP = (2, (4, 3), 8, 2, (2, 3), (1, 1)), ((7,), 24, 40)


def make(
    branch: str,
    shape: tuple | None = None,
    option: str = "full",
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> tuple[Inputs, dict[str, Any]]:
    """Tensors and settings of a branch; only those that normalise at the start have a gamma."""
    if branch.startswith("post_norm"):
        option = {"full": "branch_scale", "gamma": "plain"}.get(option, option)
    if branch.endswith("mlp"):
        return mlp_inputs(shape or SMALL_MLP, option, dtype, **more), {}
    inputs, settings = attention_inputs(shape or SMALL_ATTENTION, option, dtype, **more)
    if branch == "post_norm_attention":
        inputs["logit_scale"] = torch.linspace(2.5, 0.0, settings["num_heads"]).to(dtype)
    return inputs, settings


def run(branch: str, inputs: Inputs, **options: Any) -> Tensor:
    absent = {"qkv_bias": None, "bias": None} if branch.endswith("attention") else {}
    return BRANCHES[branch](**absent | inputs, **options)


def gradients(
    branch: str, inputs: Inputs, autocast: torch.dtype | None = None, **options: Any
) -> Inputs:
    """The output, and the gradient of all that may have one."""
    leaves = {
        name: t.detach().clone().requires_grad_(name != "branch_scale")
        for name, t in inputs.items()
    }
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = run(branch, leaves, **options)
    out.backward(wave(out))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"out": out.detach()} | grads


def wide(inputs: Inputs) -> Inputs:
    return {name: t.double() for name, t in inputs.items()}


def assert_as_exact_as_torch(branch: str, inputs: Inputs, backend: str, **options: Any) -> None:
    dtype = inputs["x"].dtype
    exact = gradients(branch, wide(inputs), backend="reference", **options)
    plain = gradients(branch, inputs, backend="reference", **options)
    found = gradients(branch, inputs, backend=backend, **options)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in plain.items()}
    if "logit_scale" in found:  # few numbers, sums of much that cancels: luck
        one, *_, other = (tensors.pop("logit_scale") for tensors in (found, plain, exact))
        assert relative_error(one, other) < (1e-4 if dtype == torch.float32 else 0.2)
    assert_no_worse(found, plain, exact, dtype)


# Every pair of shape, option and dtype occurs, not every three of them.
@pytest.mark.parametrize(
    ("branch", "shape", "option", "dtype"),
    [
        (branch, shape, option, DTYPES[(i + j) % 3])
        for branch, options in (
            ("residual_mlp", ("plain", "full", "gamma", "branch_scale")),
            ("post_norm_mlp", ("plain", "branch_scale", "plain", "branch_scale")),
        )
        for i, shape in enumerate(MLP_SHAPES)
        for j, option in enumerate(options)
        if j < 3 or branch == "residual_mlp" or i < 2
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_mlp_against_float64(
    branch: str, shape: tuple, option: str, dtype: torch.dtype, backend: str
) -> None:
    inputs, _ = make(branch, shape, option, dtype)
    assert_as_exact_as_torch(branch, inputs, backend)


ATTENTION_CASES = [
    ("residual_attention", ATTENTION_SHAPES[0], "full"),
    ("residual_attention", ATTENTION_SHAPES[1], "plain"),
    ("residual_attention", ATTENTION_SHAPES[2], "full"),
    ("residual_attention", SMALL_ATTENTION, "gamma"),
    ("residual_attention", SMALL_ATTENTION, "branch_scale"),
    ("post_norm_attention", ATTENTION_SHAPES[0], "plain"),
    ("post_norm_attention", ATTENTION_SHAPES[1], "full"),
    ("post_norm_attention", ATTENTION_SHAPES[2], "plain"),
    ("post_norm_attention", ATTENTION_SHAPES[3], "full"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("branch", "shape", "option"), ATTENTION_CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_attention_against_float64(
    branch: str, shape: tuple, option: str, dtype: torch.dtype, backend: str
) -> None:
    inputs, settings = make(branch, shape, option, dtype)
    assert_as_exact_as_torch(branch, inputs, backend, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_digits(dtype: torch.dtype, backend: str) -> None:
    """The variance as a difference of two sums would lose ten bits here."""
    inputs, _ = make("residual_mlp", ((9,), 24, 40), "plain", dtype, offset=100.0)
    assert_as_exact_as_torch("residual_mlp", inputs, backend)
    if dtype == torch.float32:
        inputs, _ = make("post_norm_mlp", ((9,), 24, 40))
        inputs["fc2_bias"] += 100
        assert_as_exact_as_torch("post_norm_mlp", inputs, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_rows(dtype: torch.dtype, backend: str) -> None:
    """More tokens than one program or thread takes."""
    inputs, _ = make("residual_mlp", ((75,), 16, 40), "full", dtype)
    assert_as_exact_as_torch("residual_mlp", inputs, backend)


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
@pytest.mark.parametrize("branch", ["residual_attention", "residual_mlp"])
def test_float32_vectors_beside_16_bit_matrices(
    branch: str, dtype: torch.dtype, backend: str
) -> None:
    inputs, settings = make(branch, dtype=dtype)
    plain = gradients(branch, inputs, backend="reference", **settings)
    mixed = {k: t if k in MATRICES else t.float() for k, t in inputs.items()}
    exact = gradients(branch, wide(inputs), backend="reference", **settings)
    found = gradients(branch, mixed, backend=backend, **settings)
    for name, got in found.items():
        assert got.dtype == (dtype if name in MATRICES | {"out"} else torch.float32), name
    assert_no_worse(found, plain, exact, dtype)


@pytest.mark.parametrize("branch", ["residual_attention", "residual_mlp"])
def test_a_tiny_gamma_in_float16(branch: str, backend: str) -> None:
    """Its products with weights are below what float16 can hold."""
    if backend == "reference":
        pytest.skip("gradients in float16 need a scaled loss")
    inputs, settings = make(branch, option="gamma")
    inputs["gamma"] *= 1e-5
    exact = gradients(branch, wide(inputs), backend="reference", **settings)
    found = gradients(branch, inputs, torch.float16, backend=backend, **settings)
    for name in ("norm_weight", "norm_bias", "proj_bias", "fc2_bias", "gamma"):
        if name in inputs:
            assert relative_error(found[name], exact[name]) < 0.05, name


@pytest.mark.parametrize("option", ["plain", "full"])
@EVERY_BRANCH
def test_autocast(branch: str, option: str, backend: str) -> None:
    """Parameters stay float32; the result is as exact as the reference's under autocast."""
    inputs, settings = make(branch, option=option)
    exact = gradients(branch, wide(inputs), backend="reference", **settings)
    plain, found = (
        gradients(branch, inputs, torch.bfloat16, backend=name, **settings)
        for name in ("reference", backend)
    )
    assert found["out"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in found.items() if name != "out")
    for tensors in (found, plain, exact):
        tensors.pop("logit_scale", None)
    assert_no_worse(found, plain, exact, torch.bfloat16)


@EVERY_BRANCH
def test_a_dropped_branch_is_nothing_and_gets_nothing(branch: str, backend: str) -> None:
    inputs, settings = make(branch)
    inputs["branch_scale"] = torch.zeros(2)
    found = gradients(branch, inputs, backend=backend, **settings)
    assert torch.equal(found.pop("out"), inputs["x"])
    assert found.pop("x").any()
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("branch", ["residual_mlp", "post_norm_mlp"])
def test_any_number_of_token_axes(branch: str, backend: str) -> None:
    inputs, _ = make(branch, ((3, 4), 24, 40))
    expected = gradients(branch, inputs, backend="reference")
    flat = inputs | {"x": inputs["x"].flatten(1, 2)}
    rows = inputs | {"x": inputs["x"].flatten(0, 2)}
    rows["branch_scale"] = inputs["branch_scale"].repeat_interleave(12)
    for case in (flat, rows):
        found = gradients(branch, case, backend=backend)
        assert found["out"].shape == case["x"].shape
        for name, value in expected.items():
            torch.testing.assert_close(found[name].view(value.shape), value, rtol=1e-4, atol=1e-5)


@EVERY_BRANCH
def test_strided_tensors(branch: str, backend: str) -> None:
    inputs, settings = make(branch, ((6, 4), 24, 40) if branch.endswith("mlp") else None)
    expected = run(branch, inputs, backend="reference", **settings)
    strided = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in inputs.items()}
    assert not strided["x"].is_contiguous()
    found = run(branch, strided, backend=backend, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@EVERY_BRANCH
def test_empty_batch(branch: str, backend: str) -> None:
    inputs, settings = make(branch)
    inputs["x"], inputs["branch_scale"] = inputs["x"][:0], inputs["branch_scale"][:0]
    found = gradients(branch, inputs, backend=backend, **settings)
    assert found.pop("out").shape == inputs["x"].shape
    for name, grad in found.items():
        if backend != "reference" or grad is not None:  # torch's attention gives the bias none
            assert grad.shape == inputs[name].shape, name
            assert (grad == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_BRANCH
def test_what_is_kept_for_the_backward(branch: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    is_mlp, option = branch.endswith("mlp"), "full" if branch.endswith("attention") else "plain"
    shape = MLP_SHAPES[2] if is_mlp else ATTENTION_SHAPES[0]
    inputs, settings = make(branch, shape, option, dtype)
    leaves = {k: t.requires_grad_(k != "branch_scale") for k, t in inputs.items()}
    # parameters in the form in which the op gets them
    small = {tuple(t.shape) for k, t in leaves.items() if k != "x"}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if tuple(t.shape) not in small:
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(branch, leaves, backend=backend, **settings)
    C, size = inputs["x"].shape[-1], dtype.itemsize
    T = inputs["x"].numel() // C
    maps = T * C * (1 if is_mlp else 5) + (T * 130 if is_mlp else 0)
    if branch.startswith("post_norm"):
        maps += T * C  # the branch before its norm
    statistics = T * (2 + (0 if is_mlp else settings["num_heads"]))
    assert sum(t.numel() * t.element_size() for t in kept.values()) == maps * size + statistics * 4


def test_a_table_of_relative_positions(backend: str) -> None:
    inputs, settings = make("residual_attention")
    h, w = settings["window"]
    inputs["bias"] = torch.randn((2 * h - 1) * (2 * w - 1), settings["num_heads"])
    expected = gradients("residual_attention", inputs, backend="reference", **settings)
    found = gradients("residual_attention", inputs, backend=backend, **settings)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_xformers_has_no_cosines() -> None:
    inputs, settings = make("post_norm_attention")
    with pytest.raises(RuntimeError, match="xformers has no attention by cosines"):
        run("post_norm_attention", inputs, backend="xformers", **settings)
