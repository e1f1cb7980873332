"""Layers that several backbones share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simmim_kernels import residual_mlp


class Backends(NamedTuple):
    """The backends of an encoder's ops; None takes the first backend that can run.

    Attributes:
        ops: backend of every op except attention.
        attention: backend of attention with its projections.
    """

    ops: str | None = None
    attention: str | None = None


def check_image(image: Tensor, channels: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless `image` is [B, channels, *size]."""
    if image.dim() != 4 or tuple(image.shape[1:]) != (channels, *size):
        raise ValueError(
            f"expected images [B, {channels}, {size[0]}, {size[1]}], got {tuple(image.shape)}; "
            "load_model(..., image_size=...) builds the model for another size"
        )


class MlpLayers(nn.Module):
    """Parameters of two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class Mlp(MlpLayers):
    """Two linear layers with exact GELU between, as a residual branch after a norm."""

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        branch_scale: Tensor | None,
        backend: str | None,
        gamma: Tensor | None = None,
    ) -> Tensor:
        """x + branch_scale · gamma · mlp(norm(x)), [B, …, C]."""
        return residual_mlp(
            x,
            norm.weight,
            norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            gamma=gamma,
            branch_scale=branch_scale,
            eps=norm.eps,
            backend=backend,
        )


class DropPath(nn.Module):
    """Drops a residual branch per image with probability `rate`; scales the rest by 1/(1-rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """Factor of every image's branch, float32 [B]; None if all of them are 1."""
        if self.rate == 0.0 or not self.training:
            return None
        scale = torch.empty(len(x), device=x.device)
        return scale.bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


def drop_path_rates(rate: float, num_blocks: int) -> list[float]:
    """The rate of every block: from 0 to `rate`, evenly spaced, both ends included."""
    return [rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]


def run_block(block: Callable[..., Tensor], recompute: bool, *inputs: object) -> Tensor:
    """Run a block; with `recompute` the backward pass computes its activations again."""
    if not recompute:
        return block(*inputs)
    # checkpoint itself saves and restores torch's generator, which the step has seeded
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return out


def init_linear(module: nn.Module, bound: float = 2.0) -> None:
    """Initialise as published: linear weights normal(0, 0.02) cut at ±bound, biases 0, norms 1."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-bound, b=bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def scale_branch(branch: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply a residual branch [B, …] by its images' factors, float32 [B]; None is 1."""
    if factor is None:
        return branch
    return branch * factor.to(branch.dtype).view(-1, *(1,) * (branch.dim() - 1))
