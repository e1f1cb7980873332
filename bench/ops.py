"""Times the ops against eager PyTorch, forward and backward: `make bench`.

Both sides are checked equal first. Shapes are those of Swin-B at 192 px.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simmim_kernels import substitute_mask_tokens

BATCH, TOKENS, WIDTH = 64, 48 * 48, 128


def published(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """The form of microsoft/SimMIM: a blend by a float mask."""
    weight = mask.unsqueeze(-1).type_as(mask_token)
    return tokens * (1.0 - weight) + mask_token.expand_as(tokens) * weight


SIDES: dict[str, Callable[..., Tensor]] = {
    "published": published,
    "reference": lambda *inputs: substitute_mask_tokens(*inputs, backend="reference"),
    "native": lambda *inputs: substitute_mask_tokens(*inputs, backend="native"),
}


def forward_backward(side: str, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    tokens, mask, token = inputs
    tokens.grad = token.grad = None
    out = SIDES[side](tokens, mask, token)
    out.backward(grad)
    assert tokens.grad is not None
    assert token.grad is not None
    return [out, tokens.grad, token.grad]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_substitute_mask_tokens(benchmark: Callable, side: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, requires_grad=True),
        torch.rand(BATCH, TOKENS) < 0.6,
        torch.randn(WIDTH, dtype=dtype, requires_grad=True),
    ]
    grad = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
    expected = [t.clone() for t in forward_backward("reference", inputs, grad)]
    got = forward_backward(side, inputs, grad)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2].float(), expected[2].float(), rtol=2e-2, atol=5e-1)
    benchmark.group = f"substitute_mask_tokens {dtype}"
    benchmark(forward_backward, side, inputs, grad)
