"""Swin Transformer as an encoder of masked images, under the published parameter names.

B batch, H W token rows and columns of a stage, C width, N heads.
Source: microsoft/SimMIM models/swin_transformer.py and models/simmim.py.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from simmim.backbone.encoder import Encoder, EncoderSpec
from simmim.backbone.layers import (
    Backends,
    Mlp,
    check_image,
    init_linear,
    run_block,
)
from simmim.backbone.stochastic_depth import DropPath, branch_of, drop_path_rates, number_blocks
from simmim_kernels import embed_patches, merge_patches, residual_attention

NORM_EPS = 1e-5


@dataclass(frozen=True)
class SwinSpec(EncoderSpec):
    """Everything that defines a Swin encoder; what a checkpoint stores to rebuild it.

    Attributes:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels.
        channels: image channels.
        embed_dim: width of the first stage; each merging doubles it.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_size: side of a window in tokens; a smaller feature map is one window.
        mlp_ratio: hidden width of the MLP over its width.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of q·k; None is 1/√(head width).
        absolute_position: learned position added to the patch tokens.
        patch_norm: LayerNorm after the patch embedding.
        drop_path: stochastic-depth rate of the last block; grows linearly from 0.
    """

    image_size: tuple[int, int] = (192, 192)
    patch_size: int = 4
    channels: int = 3
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    absolute_position: bool = False
    patch_norm: bool = True
    drop_path: float = 0.0

    arch: ClassVar[str] = "swin"

    @property
    def stride(self) -> int:
        """Pixels per side of an output cell."""
        return self.patch_size << (len(self.depths) - 1)

    def resolution(self, stage: int) -> tuple[int, int]:
        """Tokens along height and width in a stage."""
        return self.grid[0] >> stage, self.grid[1] >> stage

    def window(self, stage: int) -> int:
        """Window side in a stage: clamped to the feature map where that is smaller."""
        return min(self.window_size, *self.resolution(stage))

    def shift(self, stage: int, block: int) -> int:
        """Shift of a block: half a window in odd blocks, none where one window covers a side."""
        if block % 2 == 0 or min(self.resolution(stage)) <= self.window_size:
            return 0
        return self.window_size // 2

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        problems = []
        if len(self.num_heads) != len(self.depths):
            problems.append(
                ("num_heads", f"{len(self.num_heads)} values for {len(self.depths)} stages")
            )
        for stage, heads in enumerate(self.num_heads[: len(self.depths)]):
            width = self.embed_dim << stage
            if heads < 1 or width % heads:
                problems.append(
                    ("num_heads", f"{heads} does not divide the width {width} of stage {stage}")
                )
        if any(side % self.stride for side in self.image_size):
            near = tuple(
                max(1, round(side / self.stride)) * self.stride for side in self.image_size
            )
            problems.append(
                (
                    "image_size",
                    f"{_by(self.image_size)} px is no multiple of the encoder stride "
                    f"{self.stride} px; nearest is {_by(near)}",
                )
            )
            return problems
        for stage in range(len(self.depths)):
            resolution, window = self.resolution(stage), self.window(stage)
            if any(side % window for side in resolution):
                problems.append(("window_size", self._window_message(stage)))
                break
        return problems

    def _window_message(self, stage: int) -> str:
        resolutions = [self.resolution(i) for i in range(len(self.depths))]

        def fits(window: int) -> bool:
            return all(side % min(window, *res) == 0 for res in resolutions for side in res)

        fitting = [w for w in range(1, max(resolutions[0]) + 1) if fits(w)]
        near = min(fitting, key=lambda w: abs(w - self.window_size))
        return (
            f"a window of {self.window_size} tokens does not fit the {_by(self.resolution(stage))} "
            f"tokens of stage {stage} at {_by(self.image_size)} px; nearest that fits is {near}"
        )

    def build(self) -> "Swin":
        """The encoder, freshly initialised from torch's generator."""
        return Swin(self)


PRESETS = {
    "swin_tiny": SwinSpec(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": SwinSpec(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": SwinSpec(),
    "swin_large": SwinSpec(embed_dim=192, num_heads=(6, 12, 24, 48), window_size=12),
}


def _by(size: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in size)


class PatchEmbed(nn.Module):
    """Parameters of the projection of patches and its norm."""

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(spec.channels, spec.embed_dim, spec.patch_size, spec.patch_size)
        self.norm = nn.LayerNorm(spec.embed_dim, NORM_EPS) if spec.patch_norm else nn.Identity()


class WindowAttention(nn.Module):
    """Attention inside windows with its projections and position table, as a residual branch."""

    def __init__(self, spec: SwinSpec, stage: int, block: int) -> None:
        super().__init__()
        width, side = spec.embed_dim << stage, spec.window(stage)
        self.num_heads = spec.num_heads[stage]
        self.window, self.shift = (side, side), spec.shift(stage, block)
        self.scale = spec.qk_scale
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * side - 1) ** 2, self.num_heads)
        )
        self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, branch_scale: Tensor | None, backend: str | None
    ) -> Tensor:
        """x + branch_scale · attention(norm(x)), [B, H, W, C]."""
        return residual_attention(
            x,
            norm.weight,
            norm.bias,
            self.qkv.weight,
            self.qkv.bias,
            self.relative_position_bias_table,
            self.proj.weight,
            self.proj.bias,
            num_heads=self.num_heads,
            window=self.window,
            shift=self.shift,
            scale=self.scale,
            branch_scale=branch_scale,
            eps=norm.eps,
            backend=backend,
        )


class SwinBlock(nn.Module):
    """Window attention and MLP, each with a LayerNorm and a residual; SwinV2 replaces both."""

    attention_type: type[nn.Module] = WindowAttention
    mlp_type: type[nn.Module] = Mlp
    draws = False

    def __init__(self, spec: SwinSpec, stage: int, block: int, drop_path: float) -> None:
        super().__init__()
        width = spec.embed_dim << stage
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attn = self.attention_type(spec, stage, block)
        self.drop_path = DropPath(drop_path, branches=2)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.mlp = self.mlp_type(width, int(width * spec.mlp_ratio))

    def forward(self, x: Tensor, backends: Backends, scales: Tensor | None) -> Tensor:
        x = self.attn(x, self.norm1, branch_of(scales, 0), backends.attention)
        x = self.mlp(x, self.norm2, branch_of(scales, 1), backends.ops)
        return x


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width. [B, H, W, C] → [B, H/2, W/2, 2C].

    A version has its norm before or after the projection: over 4C or over 2C.
    """

    norm_widths = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(self.norm_widths * width, NORM_EPS)

    def forward(self, x: Tensor, backend: str | None) -> Tensor:
        return merge_patches(
            x,
            self.norm.weight,
            self.norm.bias,
            self.reduction.weight,
            eps=self.norm.eps,
            backend=backend,
        )


class SwinStage(nn.Module):
    """The blocks of one resolution, then the merging to the next; SwinV2 replaces both."""

    block_type: type[nn.Module] = SwinBlock
    merging_type: type[nn.Module] = PatchMerging

    def __init__(self, spec: SwinSpec, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            self.block_type(spec, stage, block, rate) for block, rate in enumerate(drop_paths)
        )
        last = stage == len(spec.depths) - 1
        self.downsample = None if last else self.merging_type(spec.embed_dim << stage)

    def forward(self, x: Tensor, recompute: bool, backends: Backends) -> Tensor:
        for block in self.blocks:
            x = run_block(block, recompute, x, backends)
        return x if self.downsample is None else self.downsample(x, backends.ops)


class Swin(Encoder):
    """Swin encoder with a mask token.

    Args:
        spec: the architecture.

    Raises:
        ValueError: the parts of `spec` do not fit together.
    """

    # as published; the optimiser's settings decide about position tables
    no_decay = frozenset({"absolute_pos_embed", "mask_token"})
    fused_blocks = True
    spec: SwinSpec
    stage_type: type[SwinStage] = SwinStage

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        if problems := spec.problems():
            raise ValueError("; ".join(f"{field}: {message}" for field, message in problems))
        self.spec = spec
        self.num_features = spec.embed_dim << (len(spec.depths) - 1)
        self.activation_checkpointing = False
        self.backends = Backends()
        self.patch_embed = PatchEmbed(spec)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        if spec.absolute_position:
            length = spec.grid[0] * spec.grid[1]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, length, spec.embed_dim))
        rates = iter(drop_path_rates(spec.drop_path, sum(spec.depths)))
        self.layers = nn.ModuleList(
            self.stage_type(spec, stage, [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(spec.depths)
        )
        number_blocks(self)
        self.norm = nn.LayerNorm(self.num_features, NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        self.apply(init_linear)
        for name, parameter in self.named_parameters():
            if name.endswith(("relative_position_bias_table", "absolute_pos_embed", "mask_token")):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Features of an image whose hidden tokens are replaced by the mask token.

        Args:
            image: [B, channels, height, width], normalised, or uint8 with mean and std.
            mask: bool [B, *grid], True marks a hidden token; None hides nothing.
            mean: [channels], on the 0-1 scale.
            std: [channels], on the 0-1 scale.

        Returns:
            [B, num_features, height / stride, width / stride].
        """
        check_image(image, self.spec.channels, self.spec.image_size)
        embed, C = self.patch_embed, self.spec.embed_dim
        norm = embed.norm if isinstance(embed.norm, nn.LayerNorm) else None
        tokens = embed_patches(
            image,
            mask,
            embed.proj.weight,
            embed.proj.bias,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            None if self.mask_token is None else self.mask_token.view(C),
            pos_embed=self.absolute_pos_embed[0] if self.spec.absolute_position else None,
            mean=mean,
            std=std,
            eps=NORM_EPS,
            backend=self.backends.ops,
        ).view(len(image), *self.spec.grid, C)
        recompute = self.activation_checkpointing and self.training
        for stage in self.layers:
            tokens = stage(tokens, recompute, self.backends)
        features: Tensor = self.norm(tokens).permute(0, 3, 1, 2)
        return features

    @property
    def num_layers(self) -> int:
        """See `Encoder`."""
        return sum(self.spec.depths)

    def layer_of(self, name: str) -> int:
        """See `Encoder`; merging belongs to the block before it.

        As published, absolute positions and the final norm belong to the head.
        """
        if name.startswith("patch_embed.") or name == "mask_token":
            return 0
        if match := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
            stage, block = int(match[1]), match[2]
            if block is None:
                return sum(self.spec.depths[: stage + 1])
            return sum(self.spec.depths[:stage]) + int(block) + 1
        return self.num_layers + 1
