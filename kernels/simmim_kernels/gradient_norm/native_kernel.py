"""Calls the C++ kernel of gradient_norm with the addresses of contiguous tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simmim_kernels import native


def reasons_against(*gradients: Tensor | None) -> list[str]:
    """Why the kernel cannot take these gradients; empty when it can."""
    reasons = [] if native.missing_reason is None else [native.missing_reason]
    for gradient in gradients:
        assert gradient is not None
        if gradient.device.type != "cpu" or gradient.dtype != torch.float32:
            return [*reasons, "it takes float32 on the CPU"]
        # of a convolution in channels-last: as dense, in another order, which is all the same
        if not (
            gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)
        ):
            return [*reasons, "it takes contiguous gradients"]
    return reasons


def forward(gradients: Sequence[Tensor]) -> Tensor:
    """Scalar float32."""
    assert native.extension is not None
    norm = torch.empty((), dtype=torch.float32)
    native.extension.gradient_norm(
        [g.data_ptr() for g in gradients],
        [g.numel() for g in gradients],
        torch.get_num_threads(),
        norm.data_ptr(),
    )
    return norm
