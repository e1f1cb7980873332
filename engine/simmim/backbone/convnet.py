"""What convolutional encoders share: the mask token after the stem, and recomputed blocks.

B batch, C channels, H W pixels, h w cells of the mask grid, D width of the stem.
Source: Westlake-AI/openmixup openmixup/models/backbones/mim_resnet.py (where the token goes).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from simmim.backbone.encoder import Encoder, EncoderSpec
from simmim.backbone.layers import Backends, check_image
from simmim.backbone.stochastic_depth import DropPath
from simmim_kernels import substitute_mask_tokens
from simmim_kernels.masked_l1_loss.reference import normalise_pixels


@dataclass(frozen=True)
class ConvNetSpec(EncoderSpec):
    """The settings that every convolutional encoder has.

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        drop_path: stochastic-depth rate of the last block; grows linearly from 0.
    """

    # epsilon of the norm that a classifier applies to the mean of the map; 0 means no norm
    pooled_norm_eps: ClassVar[float] = 0.0

    @property
    def patch_size(self) -> int:
        """Side of a cell of the mask grid in pixels: the stride of the stem."""
        return 4

    @property
    def stride(self) -> int:
        """Pixels per side of an output cell."""
        return 32

    def size_problems(self) -> list[tuple[str, str]]:
        """(field, message) for an image size that does not end in whole output cells."""
        if not any(side % self.stride or side < 1 for side in self.image_size):
            return []
        near = [max(1, round(side / self.stride)) * self.stride for side in self.image_size]
        return [
            (
                "image_size",
                f"{self.image_size[0]}×{self.image_size[1]} px is no multiple of the encoder "
                f"stride {self.stride} px; nearest is {near[0]}×{near[1]}",
            )
        ]


def raise_problems(problems: list[tuple[str, str]]) -> None:
    """Raise ValueError that lists all (field, message); do nothing if there are none."""
    if problems:
        raise ValueError("; ".join(f"{field}: {message}" for field, message in problems))


class ConvNet(Encoder):
    """A convolutional encoder with a mask token after its stem.

    Unlike a patch embedding, a stem with overlapping windows shows a visible cell some pixels of
    its hidden neighbours, and the convolutions after it spread them. The token hides only the cell.

    Args:
        spec: the architecture.
        stem_width: D, width of the stem's output.
        num_features: width of the output.
    """

    no_decay = frozenset({"mask_token"})
    spec: ConvNetSpec

    def __init__(self, spec: ConvNetSpec, stem_width: int, num_features: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_features = num_features
        self.activation_checkpointing = False
        self.backends = Backends()
        token = torch.zeros(1, stem_width, 1, 1)
        self.mask_token = nn.Parameter(token)

    def forward(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Features of an image whose hidden cells are replaced, after the stem, by the mask token.

        Args:
            image: [B, channels, height, width], normalised, or uint8 with mean and std; the memory
                format that it comes in is that of every map.
            mask: bool [B, *grid], True marks a hidden cell; None hides nothing.
            mean: [channels], on the 0-1 scale.
            std: [channels], on the 0-1 scale.

        Returns:
            [B, num_features, height / stride, width / stride].
        """
        check_image(image, self.spec.channels, self.spec.image_size)
        if mean is not None and std is not None:
            image = normalise_pixels(image, mean, std)
        if not torch.is_autocast_enabled(image.device.type):
            image = image.to(next(self.parameters()).dtype)
        return self.encode(image, mask)

    def encode(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Features of a normalised image; see `forward`."""
        return self.body(self.hide(self.embed(image), mask))

    def embed(self, image: Tensor) -> Tensor:
        """The stem: [B, C, H, W] → [B, D, h, w]."""
        raise NotImplementedError

    def body(self, x: Tensor) -> Tensor:
        """Everything after the stem: [B, D, h, w] → [B, num_features, …]."""
        raise NotImplementedError

    def blocks_in_order(self) -> list[nn.Module]:
        """The blocks, first to last; each returns [B, width, …, …]."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """See `Encoder`; the stem and the mask token are layer 0."""
        return len(self.blocks_in_order())

    def hide(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Put the mask token into x, [B, D, h, w], where `mask`, bool [B, h, w], is True.

        Raises:
            ValueError: the encoder has no mask token, or the mask is not on its grid.
        """
        if mask is None:
            return x
        token = self.mask_token
        if token is None:
            raise ValueError("this encoder has no mask token (a classifier's): encode without mask")
        if mask.shape != (len(x), *x.shape[2:]):
            raise ValueError(
                f"mask {tuple(mask.shape)} must be [B, h, w] of the stem's map {tuple(x.shape)}"
            )
        if not x.is_contiguous(memory_format=torch.channels_last):
            return torch.where(mask.unsqueeze(1), token.to(x.dtype), x)
        rows = x.permute(0, 2, 3, 1)  # [B, h, w, D], in memory order
        hidden = substitute_mask_tokens(
            rows.flatten(1, 2), mask.flatten(1), token.flatten(), backend=self.backends.ops
        )
        return hidden.view(rows.shape).permute(0, 3, 1, 2)

    def run(self, block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
        """Run a block on x; `activation_checkpointing` has the backward pass compute it again.

        Its stochastic depth is drawn here, once: `block` takes the factors of its branches last.
        """
        recompute, drop_path = self.activation_checkpointing and self.training, block.drop_path
        scales = cast("DropPath", drop_path)(x)
        return run_once_more(
            lambda x: block(x, *arguments, scales), block, recompute, x, draws=False
        )


def run_once_more(
    call: Callable[[Tensor], Tensor],
    owner: nn.Module,
    recompute: bool,
    x: Tensor,
    *,
    draws: bool = True,
) -> Tensor:
    """Return call(x); with `recompute` the backward pass computes its activations again.

    Args:
        call: the function to run.
        owner: the module whose batch norms `call` runs: a batch counts once in their statistics.
        recompute: whether to compute the activations again.
        x: the input of `call`.
        draws: whether `call` uses torch's generator, which the second run then finds as it was.
    """
    if not recompute:
        return call(x)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), still_statistics(owner)

    out: Tensor = checkpoint(
        call, x, use_reentrant=False, context_fn=contexts, preserve_rng_state=draws
    )
    return out


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Keep running statistics unchanged, while batch norms still normalise by their batch."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        # copies take the update: the second run must save as many tensors as the first
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm._buffers.update(buffers)
