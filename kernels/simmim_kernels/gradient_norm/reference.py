"""The norm as PyTorch has it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of the norms of all tensors."""
    return torch.nn.utils.get_total_norm(gradients)
