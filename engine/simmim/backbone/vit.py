"""Vision Transformer as an encoder of masked images, under the published (BEiT-style) names.

B batch, L patch tokens (+1 with the class token), C width, N heads.
Source: microsoft/SimMIM models/vision_transformer.py and models/simmim.py.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from simmim.backbone.attention import relative_position_bias_with_cls
from simmim.backbone.encoder import Encoder, EncoderSpec
from simmim.backbone.layers import (
    Backends,
    Mlp,
    check_image,
    init_linear,
    run_block,
)
from simmim.backbone.stochastic_depth import DropPath, branch_of, drop_path_rates
from simmim_kernels import embed_patches, residual_attention


@dataclass(frozen=True)
class ViTSpec(EncoderSpec):
    """Everything that defines a ViT encoder; what a checkpoint stores to rebuild it.

    Attributes:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels.
        channels: image channels.
        embed_dim: width.
        depth: number of blocks.
        num_heads: heads of each block.
        mlp_ratio: hidden width of the MLP over its width.
        qkv_bias: whether q and v have a bias (k has none: it would cancel in the softmax).
        qk_scale: factor of q·k; None is 1/√(head width).
        class_token: whether a class token goes before the patch tokens; relative positions need it.
        absolute_position: position added to class and patch tokens.
        frozen_position: the absolute position is a table of sines and cosines that does not train.
        shared_relative_position: one relative position table for all blocks, as published.
        layer_relative_position: a relative position table in each block.
        layer_scale: initial LayerScale gain; None means no LayerScale.
        final_norm: LayerNorm after the last block.
        norm_eps: epsilon of every LayerNorm.
        drop_path: stochastic-depth rate of the last block; grows linearly from 0.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    class_token: bool = True
    absolute_position: bool = False
    frozen_position: bool = False
    shared_relative_position: bool = True
    layer_relative_position: bool = False
    layer_scale: float | None = 0.1
    final_norm: bool = True
    norm_eps: float = 1e-6
    drop_path: float = 0.0

    arch: ClassVar[str] = "vit"

    @property
    def stride(self) -> int:
        """Pixels per side of an output cell."""
        return self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens before those of the patches."""
        return int(self.class_token)

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        problems = []
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            problems.append(
                ("num_heads", f"{self.num_heads} does not divide the width {self.embed_dim}")
            )
        relative = self.shared_relative_position or self.layer_relative_position
        if relative and not self.class_token:
            problems.append(("class_token", "relative position tables have rows for a class token"))
        if self.frozen_position and not self.absolute_position:
            problems.append(("frozen_position", "there is no absolute position to freeze"))
        if self.frozen_position and self.embed_dim % 4:
            problems.append(
                ("frozen_position", f"sines and cosines need a width of 4·n, not {self.embed_dim}")
            )
        if any(side % self.patch_size for side in self.image_size):
            near = [max(1, round(s / self.patch_size)) * self.patch_size for s in self.image_size]
            problems.append(
                (
                    "image_size",
                    f"{self.image_size[0]}×{self.image_size[1]} px is no multiple of the patch "
                    f"size {self.patch_size} px; nearest is {near[0]}×{near[1]}",
                )
            )
        return problems

    def build(self) -> "ViT":
        """The encoder, freshly initialised from torch's generator."""
        return ViT(self)


def _plain(preset: ViTSpec) -> ViTSpec:
    """The ViT of timm and lightly: learned positions, and neither relative ones nor LayerScale."""
    return replace(preset, absolute_position=True, shared_relative_position=False, layer_scale=None)


PRESETS = {
    "vit_tiny": ViTSpec(embed_dim=192, num_heads=3),
    "vit_small": ViTSpec(embed_dim=384, num_heads=6),
    "vit_base": ViTSpec(),
    "vit_large": ViTSpec(embed_dim=1024, depth=24, num_heads=16),
}
PRESETS |= {f"{name}_plain": _plain(preset) for name, preset in PRESETS.items()}


class PatchEmbed(nn.Module):
    """Parameters of the projection of patches."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(spec.channels, spec.embed_dim, spec.patch_size, spec.patch_size)


class RelativePositionBias(nn.Module):
    """Relative position table that all blocks share."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        self.relative_position_bias_table = nn.Parameter(position_table(spec))

    def forward(self) -> Tensor:
        return relative_position_bias_with_cls(self.relative_position_bias_table, self.grid)


def sine_cosine_positions(grid: tuple[int, int], width: int, num_prefix: int) -> Tensor:
    """Position of every token as sines and cosines, float32 [1, num_prefix + h·w, width].

    Prefix tokens get zeros. The first half of a patch's values encodes its column, the second its
    row; each half holds the sines of position · 10000^(-4i / width), then the cosines.

    Source: facebookresearch/mae util/pos_embed.py.
    """
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij"
    )
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]  # [L, width / 4] each
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([patches.new_zeros(num_prefix, width), patches]).float()[None]


def position_table(spec: ViTSpec) -> Tensor:
    """Zeros [(2h-1)·(2w-1) + 3, N]: one row per offset, three for the class token."""
    h, w = spec.grid
    return torch.zeros((2 * h - 1) * (2 * w - 1) + 3, spec.num_heads)


class Attention(nn.Module):
    """Attention over all tokens with its projections, as a residual branch."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        width = spec.embed_dim
        self.num_heads, self.grid = spec.num_heads, spec.grid
        self.scale = spec.qk_scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if spec.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if spec.qkv_bias else None
        self.relative_position_bias_table = (
            nn.Parameter(position_table(spec)) if spec.layer_relative_position else None
        )
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        branch_scale: Tensor | None,
        backend: str | None,
        gamma: Tensor | None,
        shared_bias: Tensor | None,
    ) -> Tensor:
        """x + branch_scale · gamma · attention(norm(x)), [B, L, C]."""
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        bias = shared_bias
        if self.relative_position_bias_table is not None:
            own = relative_position_bias_with_cls(self.relative_position_bias_table, self.grid)
            bias = own if bias is None else own + bias
        out = residual_attention(
            x.unsqueeze(1),  # one row of tokens, one window
            norm.weight,
            norm.bias,
            self.qkv.weight,
            qkv_bias,
            bias,
            self.proj.weight,
            self.proj.bias,
            num_heads=self.num_heads,
            window=(1, x.shape[1]),
            scale=self.scale,
            gamma=gamma,
            branch_scale=branch_scale,
            eps=norm.eps,
            backend=backend,
        )
        return out.squeeze(1)


class Block(nn.Module):
    """Attention and MLP, each with a LayerNorm, a LayerScale and a residual."""

    draws = False

    def __init__(self, spec: ViTSpec, drop_path: float) -> None:
        super().__init__()
        width = spec.embed_dim
        self.norm1 = nn.LayerNorm(width, spec.norm_eps)
        self.attn = Attention(spec)
        self.drop_path = DropPath(drop_path, branches=2)
        self.norm2 = nn.LayerNorm(width, spec.norm_eps)
        self.mlp = Mlp(width, int(width * spec.mlp_ratio))
        scaled = spec.layer_scale is not None
        gain = torch.full((width,), spec.layer_scale if spec.layer_scale is not None else 1.0)
        self.gamma_1 = nn.Parameter(gain.clone()) if scaled else None
        self.gamma_2 = nn.Parameter(gain.clone()) if scaled else None

    def forward(
        self, x: Tensor, shared_bias: Tensor | None, backends: Backends, scales: Tensor | None
    ) -> Tensor:
        branch_scale, attention = branch_of(scales, 0), backends.attention
        x = self.attn(x, self.norm1, branch_scale, attention, self.gamma_1, shared_bias)
        x = self.mlp(x, self.norm2, branch_of(scales, 1), backends.ops, self.gamma_2)
        return x


class ViT(Encoder):
    """ViT encoder with a mask token.

    Args:
        spec: the architecture.

    Raises:
        ValueError: the parts of `spec` do not fit together.
    """

    # as published: the ViT's mask token is decayed, the Swin's is not
    no_decay = frozenset({"pos_embed", "cls_token"})
    fused_blocks = True
    spec: ViTSpec

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        if problems := spec.problems():
            raise ValueError("; ".join(f"{field}: {message}" for field, message in problems))
        self.spec = spec
        self.num_features = spec.embed_dim
        self.activation_checkpointing = False
        self.backends = Backends()
        self.patch_embed = PatchEmbed(spec)
        self.cls_token = (
            nn.Parameter(torch.zeros(1, 1, spec.embed_dim)) if spec.class_token else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        if spec.absolute_position:
            length = spec.num_prefix + spec.grid[0] * spec.grid[1]
            self.pos_embed = nn.Parameter(
                torch.zeros(1, length, spec.embed_dim), requires_grad=not spec.frozen_position
            )
        self.rel_pos_bias = RelativePositionBias(spec) if spec.shared_relative_position else None
        rates = drop_path_rates(spec.drop_path, spec.depth)
        self.blocks = nn.ModuleList(Block(spec, rate) for rate in rates)
        self.norm = (
            nn.LayerNorm(spec.embed_dim, spec.norm_eps) if spec.final_norm else nn.Identity()
        )
        self._initialise()

    def _initialise(self) -> None:
        # published: normal(0, 0.02) cut at one standard deviation, and the output projections of
        # block i divided by √(2i)
        self.apply(lambda module: init_linear(module, bound=0.02))
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02, a=-0.02, b=0.02)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "mask_token", "pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
            elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                number = int(name.split(".")[1]) + 1
                parameter.data.div_(math.sqrt(2.0 * number))
        spec = self.spec
        if spec.frozen_position:
            table = sine_cosine_positions(spec.grid, spec.embed_dim, spec.num_prefix)
            self.pos_embed.data.copy_(table)

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
            [B, num_features, height / patch_size, width / patch_size], without the class token.
        """
        check_image(image, self.spec.channels, self.spec.image_size)
        B = len(image)
        tokens = embed_patches(
            image,
            mask,
            self.patch_embed.proj.weight,
            self.patch_embed.proj.bias,
            mask_token=None if self.mask_token is None else self.mask_token.view(-1),
            mean=mean,
            std=std,
            backend=self.backends.ops,
        )
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.to(tokens.dtype).expand(B, -1, -1), tokens), dim=1)
        if self.spec.absolute_position:
            tokens = tokens + self.pos_embed
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        recompute = self.activation_checkpointing and self.training
        for block in self.blocks:
            tokens = run_block(block, recompute, tokens, bias, self.backends)
        features: Tensor = self.norm(tokens)[:, self.spec.num_prefix :].transpose(1, 2)
        return features.reshape(B, self.num_features, *self.spec.grid)

    @property
    def num_layers(self) -> int:
        """See `Encoder`."""
        return self.spec.depth

    def layer_of(self, name: str) -> int:
        """See `Encoder`; as published, a shared position table belongs to the head."""
        if name.startswith("patch_embed.") or name in ("cls_token", "pos_embed", "mask_token"):
            return 0
        match = re.match(r"blocks\.(\d+)\.", name)
        return int(match[1]) + 1 if match else self.num_layers + 1
