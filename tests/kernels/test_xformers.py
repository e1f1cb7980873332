"""The xformers backend of attention, with a stand-in that enforces xformers' rules for a bias.

What this proves is layout, alignment and gradients; xformers itself runs on CUDA devices only.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim_kernels import residual_attention, window_attention
from simmim_kernels.window_attention import reference, xformers_kernel


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, scale: float
) -> Tensor:
    """[B, M, H, K] as the real one; refuses what it refuses (xformers 0.0.35, fmha/common.py)."""
    if attn_bias is not None:
        B, M, H, _ = query.shape
        assert attn_bias.shape == (B, H, M, M)
        assert attn_bias.dtype == query.dtype
        assert attn_bias.stride(-1) == 1
        assert attn_bias.stride(-2) % 8 == 0
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)
    return out.transpose(1, 2)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (3, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_the_reference(shift: tuple[int, int], with_bias: bool, dtype: torch.dtype) -> None:
    values = torch.randn(2, 12, 6, 3 * 32).to(dtype)
    pairs = torch.randn(4, 36, 36)
    found = {}
    for attend in (reference.window_attention, xformers_kernel.window_attention):
        qkv, bias = values.clone().requires_grad_(), pairs.clone().requires_grad_()
        out = attend(qkv, bias if with_bias else None, 4, (6, 6), shift, 0.3)
        out.backward(torch.ones_like(out))
        found[attend] = [out, qkv.grad, *([bias.grad] if with_bias else [])]
    # in bfloat16 the gradients of a batch's biases are rounded before they are added
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for ours, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_on_a_cpu_it_says_why_not() -> None:
    qkv = torch.randn(1, 6, 6, 3 * 8)
    with pytest.raises(RuntimeError, match="xformers runs on CUDA devices, the tensors are on cpu"):
        window_attention(qkv, None, 2, 6, backend="xformers")
    with pytest.raises(RuntimeError, match="residual_attention: backend='xformers' cannot run"):
        residual_attention(
            torch.randn(1, 6, 6, 8),
            torch.ones(8),
            torch.zeros(8),
            torch.randn(24, 8),
            None,
            None,
            torch.randn(8, 8),
            torch.zeros(8),
            num_heads=2,
            window=6,
            backend="xformers",
        )


@pytest.mark.parametrize("built", [True, False])
def test_the_build_is_probed_and_not_the_import(
    built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ModuleType("xformers._cpp_lib")
    library._built_with_cuda = built  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers.ops", ModuleType("xformers.ops"))
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", library)
    xformers_kernel.missing_reason.cache_clear()
    try:
        reason = xformers_kernel.missing_reason()
    finally:
        xformers_kernel.missing_reason.cache_clear()
    if built:
        assert reason is None
    else:
        assert "libcudart" in str(reason)
        assert "pip install" in str(reason)
