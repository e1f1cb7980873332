"""substitute_mask_tokens: every backend against the reference in float64, forward and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simmim_kernels import native, substitute_mask_tokens
from simmim_kernels.substitute_mask_tokens import reference

NEEDS_EXTENSION = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
SHAPES = [(2, 36, 48), (1, 1, 1), (3, 7, 63), (2, 100, 5), (4, 80, 16)]


def make(shape: tuple[int, int, int], dtype: torch.dtype, hidden: float = 0.6) -> list[Tensor]:
    B, L, D = shape
    tokens = torch.randn(B, L, D, dtype=torch.float64)
    mask = torch.rand(B, L) < hidden
    return [
        tokens.to(dtype),
        mask,
        torch.randn(D, dtype=torch.float64).to(dtype),
        torch.randn(L, D, dtype=torch.float64).to(dtype),
        torch.randn(B, L, D, dtype=torch.float64).to(dtype),
    ]


def run(function: Callable[..., Tensor], inputs: list[Tensor], position: bool) -> list[Tensor]:
    tokens, mask, token, pos_embed, grad = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (tokens, token, pos_embed)]
    out = function(leaves[0], mask, leaves[1], leaves[2] if position else None)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


# Every pair of shape, dtype and position occurs, not every three of them.
@pytest.mark.parametrize(
    ("shape", "dtype", "position"),
    [
        (shape, dtype, (i + j) % 2 == 0)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int], position: bool
) -> None:
    inputs = make(shape, dtype)

    def ours(*args: Tensor | None) -> Tensor:
        return substitute_mask_tokens(*args[:3], pos_embed=args[3], backend=backend)

    exact = run(
        reference.substitute_mask_tokens,
        [t.double() if t.dtype.is_floating_point else t for t in inputs],
        position,
    )
    torch_result = run(reference.substitute_mask_tokens, inputs, position)
    for got, expected, plain in zip(run(ours, inputs, position), exact, torch_result, strict=True):
        error = (got.double() - expected).abs().max()
        allowed = 2 * (plain.double() - expected).abs().max() + 1e-6
        assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("hidden", [0.0, 1.0], ids=["none", "all"])
def test_all_or_nothing_hidden(backend: str, hidden: float) -> None:
    tokens, mask, token, _, _ = make((2, 9, 5), torch.float32, hidden)
    out = substitute_mask_tokens(tokens, mask, token, backend=backend)
    assert torch.equal(out, token.expand_as(tokens) if hidden else tokens)


def test_non_finite_values_under_hidden_tokens_stay_there(backend: str) -> None:
    tokens, mask, token, _, grad = make((2, 50, 8), torch.float32)
    tokens[mask] = float("nan")
    tokens.requires_grad_()
    token.requires_grad_()
    out = substitute_mask_tokens(tokens, mask, token, backend=backend)
    out.backward(grad)
    assert out.isfinite().all()
    assert tokens.grad.isfinite().all()
    assert token.grad.isfinite().all()
    assert (tokens.grad[mask] == 0).all()


def test_strided_inputs_and_empty_batch(backend: str) -> None:
    tokens, mask, token, _, _ = make((4, 10, 6), torch.float32)
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1)[::2]
    out = substitute_mask_tokens(strided, mask[::2], token, backend=backend)
    assert torch.equal(out, reference.substitute_mask_tokens(tokens[::2], mask[::2], token, None))
    empty = substitute_mask_tokens(tokens[:0], mask[:0], token.requires_grad_(), backend=backend)
    empty.sum().backward()
    assert empty.shape == (0, 10, 6)
    assert (token.grad == 0).all()


def test_mask_token_in_another_dtype() -> None:
    """Under autocast tokens are bfloat16 and the parameter float32."""
    tokens, mask, token, _, grad = make((2, 20, 8), torch.bfloat16)
    parameter = token.float().requires_grad_()
    substitute_mask_tokens(tokens, mask, parameter).backward(grad)
    assert parameter.grad.dtype == torch.float32


@NEEDS_EXTENSION
def test_mask_token_gradient_ignores_the_thread_count() -> None:
    tokens, mask, token, _, grad = make((8, 300, 33), torch.float32)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = token.clone().requires_grad_()
        substitute_mask_tokens(tokens, mask, leaf, backend="native").backward(grad)
        found.append(leaf.grad)
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
