"""ResNet as an encoder of masked images, under torchvision's parameter names, which are timm's too.

The stride of a bottleneck is in its 3×3 convolution ("v1.5"), as in both libraries.
B batch, C width of a stage, h w cells of the mask grid.
Source: He et al. 2015 (arXiv 1512.03385); pytorch/vision torchvision/models/resnet.py.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.batch_norm import norm_relu
from simmim.backbone.convnet import ConvNet, ConvNetSpec, raise_problems
from simmim.backbone.stochastic_depth import DropPath, branch_of, drop_path_rates, number_blocks


@dataclass(frozen=True)
class ResNetSpec(ConvNetSpec):
    """Everything that defines a ResNet encoder; what a checkpoint stores to rebuild it.

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        drop_path: stochastic-depth rate of the last block; grows linearly from 0.
        depths: blocks of each of the four stages.
        bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions (from ResNet-50 on) instead of two 3×3.
        width: width of the stem; every stage is twice as wide as the one before.
        zero_init_residual: begin with the weight of each block's last norm at 0, so that a block
            starts as its shortcut.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    zero_init_residual: bool = True

    arch: ClassVar[str] = "resnet"

    @property
    def expansion(self) -> int:
        """Width of a block's output over the width of its 3×3 convolutions."""
        return 4 if self.bottleneck else 1

    def problems(self) -> list[tuple[str, str]]:
        """(field, message) for everything that does not fit together; empty if it can be built."""
        problems = self.size_problems()
        if len(self.depths) != 4 or min(self.depths) < 1:
            problems.append(("depths", f"{list(self.depths)} must be four numbers of blocks"))
        if self.width < 1:
            problems.append(("width", f"{self.width} must be at least 1"))
        return problems

    def build(self) -> "ResNet":
        """The encoder, freshly initialised from torch's generator."""
        return ResNet(self)


PRESETS = {
    "resnet18": ResNetSpec(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetSpec(bottleneck=False),
    "resnet50": ResNetSpec(),
    "resnet101": ResNetSpec(depths=(3, 4, 23, 3)),
    "resnet152": ResNetSpec(depths=(3, 8, 36, 3)),
}


class Block(nn.Module):
    """Two 3×3 convolutions, or with `bottleneck` a 1×1, a 3×3 and a 1×1, added to a shortcut.

    Args:
        inputs: width of the input.
        width: width of the 3×3 convolutions.
        stride: stride of the first 3×3 convolution.
        bottleneck: whether the convolutions are 1×1, 3×3 and 1×1.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, drop_path: float
    ) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.drop_path = DropPath(drop_path)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the sum."""
        return self.bn3 if self.bottleneck else self.bn2

    def forward(self, x: Tensor, backend: str | None, scales: Tensor | None) -> Tensor:
        """[B, inputs, …] → [B, outputs, …], smaller by the stride; `backend` runs the norms."""
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.conv2(norm_relu(self.bn1, self.conv1(x), backend=backend))
        if self.bottleneck:
            branch = self.conv3(norm_relu(self.bn2, branch, backend=backend))
        return norm_relu(self.last_norm, branch, shortcut, branch_of(scales, 0), backend=backend)


class ResNet(ConvNet):
    """ResNet encoder with a mask token after the stem (7×7 convolution, norm, ReLU, max-pooling).

    Args:
        spec: the architecture.

    Raises:
        ValueError: the parts of `spec` do not fit together.
    """

    spec: ResNetSpec

    def __init__(self, spec: ResNetSpec) -> None:
        raise_problems(spec.problems())
        super().__init__(spec, spec.width, (spec.width << 3) * spec.expansion)
        self.conv1 = nn.Conv2d(spec.channels, spec.width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.width)
        rates = iter(drop_path_rates(spec.drop_path, sum(spec.depths)))
        inputs = spec.width
        for stage, depth in enumerate(spec.depths):
            width, blocks = spec.width << stage, []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Block(inputs, width, stride, spec.bottleneck, next(rates)))
                inputs = width * spec.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        number_blocks(self)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and self.spec.zero_init_residual:
                nn.init.zeros_(module.last_norm.weight)
        assert self.mask_token is not None
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def blocks_in_order(self) -> list[nn.Module]:
        """See `ConvNet`; [B, width, …, …]."""
        stages = [self.get_submodule(f"layer{stage}") for stage in range(1, 5)]
        return [block for stage in stages for block in stage.children()]

    def embed(self, image: Tensor) -> Tensor:
        """The stem: [B, C, H, W] → [B, width, H/4, W/4]."""
        x = norm_relu(self.bn1, self.conv1(image), backend=self.backends.ops)
        return F.max_pool2d(x, 3, 2, 1)

    def body(self, x: Tensor) -> Tensor:
        """The four stages: [B, width, h, w] → [B, num_features, h/8, w/8]."""
        for block in self.blocks_in_order():
            x = self.run(block, x, self.backends.ops)
        return x

    def layer_of(self, name: str) -> int:
        """See `Encoder`; a block's shortcut belongs to the block."""
        match = re.match(r"layer(\d)\.(\d+)\.", name)
        if match is None:
            return 0
        return sum(self.spec.depths[: int(match[1]) - 1]) + int(match[2]) + 1
