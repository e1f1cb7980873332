"""The interface of every encoder of images, and the description of its architecture.

B batch, C channels, H W pixels, D width, h w cells of the encoder's output.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from simmim.backbone.layers import Backends


@dataclass(frozen=True)
class EncoderSpec:
    """The architecture of an encoder in plain values; what a checkpoint stores to rebuild it.

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        drop_path: stochastic-depth rate of the last block; grows linearly from 0.
        arch: name of the kind of architecture, in a checkpoint.
        cosine_attention: whether attention is of the scaled-cosine kind, which has fewer backends.
    """

    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    drop_path: float = 0.0

    arch: ClassVar[str] = ""
    cosine_attention: ClassVar[bool] = False

    @property
    def patch_size(self) -> int:
        """Side of a cell of the mask grid, in pixels."""
        raise NotImplementedError

    @property
    def stride(self) -> int:
        """Pixels per side of an output cell."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the mask grid along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        raise NotImplementedError

    def build(self) -> "Encoder":
        """The encoder, freshly initialised from torch's generator."""
        raise NotImplementedError


class Encoder(nn.Module):
    """An encoder with a mask token: image → feature map.

    Attributes:
        spec: the architecture.
        num_features: D, width of the feature map.
        mask_token: replaces hidden cells; None if nothing is ever hidden.
        backends: the backends of its ops.
        activation_checkpointing: whether the backward pass computes activations again.
        no_decay: names of parameters that weight decay leaves alone.
        fused_blocks: whether its blocks are ops of simmim_kernels, which torch.compile cannot fuse
            any further.
    """

    spec: EncoderSpec
    num_features: int
    mask_token: nn.Parameter | None
    backends: Backends
    activation_checkpointing: bool
    no_decay: frozenset[str]
    fused_blocks: bool = False

    def forward(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Features of an image whose hidden cells are replaced by the mask token.

        Args:
            image: [B, channels, height, width], normalised, or uint8 with mean and std.
            mask: bool [B, *spec.grid], True marks a hidden cell; None hides nothing.
            mean: [channels], on the 0-1 scale.
            std: [channels], on the 0-1 scale.

        Returns:
            [B, num_features, height / stride, width / stride].
        """
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Number of blocks between embedding and head, as layer-wise decay counts them."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: embeddings 0, blocks from 1, the rest `num_layers` + 1.

        Args:
            name: the parameter's name in the encoder, without a prefix.
        """
        raise NotImplementedError
