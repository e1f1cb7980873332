"""Window attention with other numbers of warps and programs than those it is launched with."""

from typing import Any

import torch

from bench.gpu_stages.stage import Emit, is_tiny, milliseconds
from simmim_kernels.report.models import ATTENTIONS
from simmim_kernels.window_attention import triton_kernel as kernel
from simmim_kernels.window_attention.arguments import Windows

WARPS = (1, 2, 4, 8)
PROGRAMS = (264, 396, 432, 528, 792, 1056)


class Warps:
    """A kernel launched with another number of warps."""

    def __init__(self, launched: Any, num_warps: int) -> None:
        self.launched, self.num_warps = launched, num_warps

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        launch = self.launched[grid]
        return lambda *given, **named: launch(*given, **named | {"num_warps": self.num_warps})


def run(emit: Emit, seconds: float) -> None:
    """Emit the times of the forward and the backward of every shape, for every choice."""
    shapes = ATTENTIONS[:1] if is_tiny() else ATTENTIONS
    choices = [("num_warps", n) for n in WARPS] + [("programs", n) for n in PROGRAMS]
    part = seconds / (len(shapes) * len(choices)) / 3
    names = [n for n in vars(kernel) if n.startswith("_attend_")]
    for attention in shapes:
        (H, W), N = attention.side, attention.num_heads
        windows = Windows(N, attention.window, attention.shift, attention.head_width**-0.5)
        C = N * attention.head_width
        qkv = torch.randn(attention.batch, H, W, 3 * C, device="cuda", dtype=torch.bfloat16)
        offsets = (2 * attention.window[0] - 1) * (2 * attention.window[1] - 1)
        bias = torch.randn(offsets, N, device="cuda") if attention.biased else None
        factors = torch.ones(N, device="cuda") if attention.cosine else None
        for what, number in choices:
            before = {name: getattr(kernel, name) for name in (*names, "PROGRAMS")}
            if what == "programs":
                kernel.PROGRAMS = number
            else:
                for name in names:
                    setattr(kernel, name, Warps(before[name], number))
            try:
                out, sums = kernel.forward(qkv, bias, windows, factors)
                given = (out, qkv, bias, out, sums, windows, bias is not None, factors)
                forward = milliseconds(lambda: kernel.forward(qkv, bias, windows, factors), part)  # noqa: B023
                backward = milliseconds(lambda: kernel.backward(*given), part)  # noqa: B023
                found: dict[str, Any] = {
                    "forward_ms": forward["device_ms"],
                    "backward_ms": backward["device_ms"],
                }
            except Exception as error:  # a choice that the card cannot launch is a result too
                found = {"failed": str(error)[:200]}
            finally:
                for name, value in before.items():
                    setattr(kernel, name, value)
            emit("attention", model=attention.model, choice=what, number=number, **found)
