"""Swin Transformer V2 as an encoder of masked images, under the published parameter names.

A norm follows each branch, attention is the cosine of q and k times a learned factor, and a small
network over log-spaced offsets gives the position bias, for any window.

B batch, H W token rows and columns of a stage, C width, N heads, K head width, w side of a window.
Source: microsoft/Swin-Transformer models/swin_transformer_v2.py and models/simmim.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from simmim.backbone.layers import MlpLayers
from simmim.backbone.swin import PatchMerging, Swin, SwinBlock, SwinSpec, SwinStage
from simmim_kernels import post_norm_attention, post_norm_mlp

# Hidden width of the network of position biases, and the largest bias it gives.
POSITION_HIDDEN, LARGEST_BIAS = 512, 16.0


@dataclass(frozen=True)
class SwinV2Spec(SwinSpec):
    """Everything that defines a SwinV2 encoder; see `SwinSpec`, whose `qk_scale` stays None.

    Attributes:
        pretrained_window_sizes: for each stage, the window that the position network was trained
            with; 0 is the stage's own window, and () is 0 for all stages.
    """

    window_size: int = 12
    pretrained_window_sizes: tuple[int, ...] = ()

    arch: ClassVar[str] = "swinv2"
    cosine_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not any(self.pretrained_window_sizes):
            object.__setattr__(self, "pretrained_window_sizes", (0,) * len(self.depths))

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        problems = super().problems()
        if self.qk_scale is not None:
            problems.append(("qk_scale", "has no meaning for SwinV2; leave it out"))
        if len(self.pretrained_window_sizes) != len(self.depths):
            count = len(self.pretrained_window_sizes)
            problems.append(
                ("pretrained_window_sizes", f"{count} values for {len(self.depths)} stages")
            )
        if any(size < 0 for size in self.pretrained_window_sizes):
            problems.append(("pretrained_window_sizes", "a window has at least 0 tokens"))
        return problems

    def build(self) -> "SwinV2":
        """The encoder, freshly initialised from torch's generator."""
        return SwinV2(self)


PRESETS = {
    "swinv2_tiny": SwinV2Spec(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_small": SwinV2Spec(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_base": SwinV2Spec(),
    "swinv2_large": SwinV2Spec(embed_dim=192, num_heads=(6, 12, 24, 48)),
    # as the published code builds these two: without the paper's extra norm after every sixth block
    "swinv2_huge": SwinV2Spec(embed_dim=352, num_heads=(11, 22, 44, 88)),
    "swinv2_giant": SwinV2Spec(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128)),
}


class CosineWindowAttention(nn.Module):
    """Cosine attention inside windows with its projections and position network."""

    def __init__(self, spec: SwinV2Spec, stage: int, block: int) -> None:
        super().__init__()
        width = spec.embed_dim << stage
        self.num_heads = spec.num_heads[stage]
        self.window, self.shift = spec.window(stage), spec.shift(stage, block)
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, POSITION_HIDDEN),
            nn.ReLU(),
            nn.Linear(POSITION_HIDDEN, self.num_heads, bias=False),
        )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if spec.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if spec.qkv_bias else None
        self.proj = nn.Linear(width, width)
        offsets = log_offsets(self.window, spec.pretrained_window_sizes[stage])
        self.register_buffer("offsets", offsets, persistent=False)

    offsets: Tensor

    def position_table(self) -> Tensor:
        """Bias of every offset in a window, [(2w-1)², N] in the dtype of the parameters."""
        table: Tensor = LARGEST_BIAS * torch.sigmoid(self.cpb_mlp(self.offsets))
        return table

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, branch_scale: Tensor | None, backend: str | None
    ) -> Tensor:
        """x + branch_scale · norm(attention(x)), [B, H, W, C]."""
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        # a bias of up to 16 needs float32
        with torch.autocast(x.device.type, enabled=False):
            table = self.position_table()
        return post_norm_attention(
            x,
            self.qkv.weight,
            qkv_bias,
            self.logit_scale.flatten(),
            table,
            self.proj.weight,
            self.proj.bias,
            norm.weight,
            norm.bias,
            num_heads=self.num_heads,
            window=self.window,
            shift=self.shift,
            branch_scale=branch_scale,
            eps=norm.eps,
            backend=backend,
        )


def log_offsets(window: int, pretrained: int = 0) -> Tensor:
    """Inputs of the position network, float32 [(2w-1)², 2]: offsets on a logarithmic scale.

    Args:
        window: side in tokens.
        pretrained: the window that the offsets are relative to; 0 is `window`.
    """
    offset = torch.arange(1 - window, window, dtype=torch.float32)
    # a window of one token has no offsets; 0 / 0 in the published code
    offset = 8 * offset / max(1, (pretrained or window) - 1)
    scaled = offset.sign() * torch.log2(offset.abs() + 1.0) / math.log2(8)
    rows, columns = torch.meshgrid(scaled, scaled, indexing="ij")
    return torch.stack((rows, columns), dim=-1).view(-1, 2)


class PostNormMlp(MlpLayers):
    """Two linear layers with exact GELU between, as a residual branch before a norm."""

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, branch_scale: Tensor | None, backend: str | None
    ) -> Tensor:
        """x + branch_scale · norm(mlp(x)), [B, …, C]."""
        return post_norm_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            norm.weight,
            norm.bias,
            branch_scale=branch_scale,
            eps=norm.eps,
            backend=backend,
        )


class SwinV2Block(SwinBlock):
    """Window attention and MLP, each followed by a LayerNorm, then the residual."""

    attention_type = CosineWindowAttention
    mlp_type = PostNormMlp


class PostNormPatchMerging(PatchMerging):
    """`PatchMerging` with its norm after the projection."""

    norm_widths = 2

    def forward(self, x: Tensor, backend: str | None) -> Tensor:
        B, H, W, C = x.shape
        # the neighbours (0,0), (1,0), (0,1), (1,1) as (row, column), C channels each
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5)
        merged: Tensor = self.norm(self.reduction(x.reshape(B, H // 2, W // 2, 4 * C)))
        return merged


class SwinV2Stage(SwinStage):
    """The blocks of one resolution, then the merging to the next."""

    block_type = SwinV2Block
    merging_type = PostNormPatchMerging


class SwinV2(Swin):
    """SwinV2 encoder with a mask token; see `Swin`.

    Args:
        spec: the architecture.

    Raises:
        ValueError: the parts of `spec` do not fit together.
    """

    stage_type = SwinV2Stage

    def _initialise(self) -> None:
        super()._initialise()
        for name, parameter in self.named_parameters():
            if ".blocks." in name and (".norm1." in name or ".norm2." in name):
                nn.init.zeros_(parameter)  # every branch starts at zero
