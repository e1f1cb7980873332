"""ConvNeXt as an encoder of masked images, under timm's parameter names.

The names are timm's and not torchvision's: they say what a parameter is
(`stages.0.blocks.1.conv_dw`, which torchvision calls `features.1.1.block.0`), and timm's ConvNeXt
checkpoints on the Hub have them.
B batch, C width of a stage, h w cells of the mask grid.
Source: Liu et al. 2022 (arXiv 2201.03545); timm/models/convnext.py of
huggingface/pytorch-image-models.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.convnet import ConvNet, ConvNetSpec, raise_problems
from simmim.backbone.layers import scale_branch
from simmim.backbone.stochastic_depth import DropPath, branch_of, drop_path_rates, number_blocks

NORM_EPS = 1e-6


@dataclass(frozen=True)
class ConvNeXtSpec(ConvNetSpec):
    """Everything that defines a ConvNeXt encoder; what a checkpoint stores to rebuild it.

    The encoder ends without a norm: as published, a classifier normalises the mean instead.

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        drop_path: stochastic-depth rate of the last block; grows linearly from 0.
        depths: blocks of each of the four stages.
        widths: width of each stage; the first is also the stem's.
        layer_scale: initial gain of every branch's channels; None means no gain.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    layer_scale: float | None = 1e-6

    arch: ClassVar[str] = "convnext"
    pooled_norm_eps: ClassVar[float] = NORM_EPS

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        problems = self.size_problems()
        for name, values in (("depths", self.depths), ("widths", self.widths)):
            if len(values) != 4 or min(values) < 1:
                problems.append((name, f"{list(values)} must be four numbers, one for each stage"))
        return problems

    def build(self) -> "ConvNeXt":
        """The encoder, freshly initialised from torch's generator."""
        return ConvNeXt(self)


PRESETS = {
    "convnext_tiny": ConvNeXtSpec(),
    "convnext_small": ConvNeXtSpec(depths=(3, 3, 27, 3)),
    "convnext_base": ConvNeXtSpec(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
    "convnext_large": ConvNeXtSpec(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)),
}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every cell of a map [B, C, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two linear layers over the channels with exact GELU between, [B, h, w, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A 7×7 convolution of every channel, a norm and an MLP, added to the input [B, C, h, w]."""

    def __init__(self, width: int, layer_scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.mlp = Mlp(width)
        gamma = None if layer_scale is None else torch.full((width,), layer_scale)
        self.gamma = None if gamma is None else nn.Parameter(gamma)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, scales: Tensor | None) -> Tensor:
        branch = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        if self.gamma is not None:
            branch = branch * self.gamma.to(branch.dtype)
        return x + scale_branch(branch, branch_of(scales, 0)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A norm and a 2×2 convolution that halve the map (not in the first stage), then blocks."""

    def __init__(self, spec: ConvNeXtSpec, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        width = spec.widths[stage]
        self.downsample: nn.Module = nn.Identity()
        if stage:
            before = spec.widths[stage - 1]
            self.downsample = nn.Sequential(ChannelNorm(before), nn.Conv2d(before, width, 2, 2))
        self.blocks = nn.Sequential(*(Block(width, spec.layer_scale, r) for r in drop_paths))


class ConvNeXt(ConvNet):
    """ConvNeXt encoder with a mask token after the stem (4×4 convolution of stride 4, norm).

    Args:
        spec: the architecture.

    Raises:
        ValueError: the parts of `spec` do not fit together.
    """

    spec: ConvNeXtSpec

    def __init__(self, spec: ConvNeXtSpec) -> None:
        raise_problems(spec.problems())
        super().__init__(spec, spec.widths[0], spec.widths[-1])
        width = spec.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(spec.channels, width, 4, 4), ChannelNorm(width))
        rates = drop_path_rates(spec.drop_path, sum(spec.depths))
        ends = [sum(spec.depths[:stage]) for stage in range(5)]
        self.stages = nn.ModuleList(
            Stage(spec, stage, rates[slice(*ends[stage : stage + 2])]) for stage in range(4)
        )
        number_blocks(self)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.mask_token is not None
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def blocks_in_order(self) -> list[nn.Module]:
        """See `ConvNet`; [B, width, …, …]."""
        return [block for stage in self._stages() for block in stage.blocks]

    def embed(self, image: Tensor) -> Tensor:
        """The stem: [B, C, H, W] → [B, widths[0], H/4, W/4]."""
        out: Tensor = self.stem(image)
        return out

    def body(self, x: Tensor) -> Tensor:
        """The four stages: [B, widths[0], h, w] → [B, widths[3], h/8, w/8]."""
        for stage in self._stages():
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self.run(block, x)
        return x

    def layer_of(self, name: str) -> int:
        """See `Encoder`; what halves the map belongs to the block after it."""
        match = re.match(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.", name)
        if match is None:
            return 0
        return sum(self.spec.depths[: int(match[1])]) + int(match[2] or 0) + 1

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]
