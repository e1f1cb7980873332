"""Layers that several backbones share."""

from typing import Any, NamedTuple

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


def run_block(block: nn.Module, recompute: bool, x: Tensor, *inputs: object) -> Tensor:
    """Run a block on x; with `recompute` the backward pass computes its activations again.

    Its stochastic depth is drawn here, once: `block` takes the factors of its branches last.
    A block that draws nothing from torch's generator says so by `draws = False`; the state of the
    generator is then not saved for the second run, which no CUDA graph could hold.
    """
    drop_path: Any = block.drop_path
    scales = drop_path(x)
    out: Tensor
    if not recompute:
        out = block(x, *inputs, scales)
        return out
    saved = bool(getattr(block, "draws", True))
    out = checkpoint(block, x, *inputs, scales, use_reentrant=False, preserve_rng_state=saved)
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
