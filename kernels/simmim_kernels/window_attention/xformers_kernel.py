"""window_attention through xformers' memory_efficient_attention; its only user.

Never run on a GPU by us: its layout and rules are tested against a stand-in. The operator that
takes a bias is PyTorch's own memory-efficient kernel under another name, with the same costs.
"""

from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim_kernels.window_attention import reference

# The rows of a bias must start at multiples of 16 bytes.
_ROW = 8


@cache
def missing_reason() -> str | None:
    """Why xformers cannot be used; None when its CUDA operators are there."""
    try:
        import_module("xformers.ops")
        library = import_module("xformers._cpp_lib")
    except Exception as error:  # a broken install raises whatever it likes
        return f"xformers cannot be imported ({error}); `pip install xformers`"
    # not the operators' own word: they are listed as available where every call is refused
    if not library._built_with_cuda:
        return (
            "the CUDA extension of xformers does not load, often because it was built for another "
            "CUDA release (0.0.35 needs libcudart.so.12: `pip install nvidia-cuda-runtime-cu12`); "
            "`python -m xformers.info` shows what it was built with"
        )
    return None


def reasons_against(*tensors: Tensor | None) -> list[str]:
    """Why xformers cannot take these tensors; empty when it can."""
    present = [t for t in tensors if t is not None]
    if present and present[0].device.type != "cuda":
        return [f"xformers runs on CUDA devices, the tensors are on {present[0].device}"]
    reason = missing_reason()
    reasons = [] if reason is None else [reason]
    for tensor in present:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reasons.append(f"xformers takes float32, bfloat16 and float16, not {tensor.dtype}")
            break
    return reasons


def reasons_against_cosines(*tensors: Tensor | None) -> list[str]:
    """Why xformers cannot attend by cosines."""
    return ["xformers has no attention by cosines (logit_scale)", *reasons_against(*tensors)]


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """As the reference; the gradient is xformers' own, that of the bias included."""
    attend = import_module("xformers.ops").memory_efficient_attention
    q, k, v = (t.transpose(1, 2) for t in reference.split(qkv, num_heads, window, shift))
    pairs = reference.bias_of_windows(bias, qkv.shape[1:3], num_heads, window, shift, qkv.device)
    if pairs is not None:
        S = pairs.shape[-1]
        pairs = F.pad(pairs.to(q.dtype), (0, -S % _ROW))[..., :S].expand(len(qkv), -1, -1, -1)
    out: Tensor = attend(q, k, v, attn_bias=pairs, scale=scale)
    return reference.join(out.transpose(1, 2), qkv.shape[1:3], num_heads, window, shift)
