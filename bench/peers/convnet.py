"""SimMIM on the ResNet of other packages: a mask token after the stem, published head and loss.

Models are called as model(image, mask) → loss, on normalised images [B, C, H, W] and a mask, bool
[B, h, w], whose cells are the positions of the stem's feature map. Parameters have the same names
in torchvision, in timm and in our ResNet.
Source: Westlake-AI/openmixup openmixup/models/backbones/mim_resnet.py (place of the mask token).
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.packages import import_package
from bench.peers.peer import Pair, Peer, Unavailable, take
from bench.peers.published import published_head, published_loss
from simmim.backbone.build import Spec
from simmim.backbone.resnet import ResNetSpec

# the memory formats that users of convolutional networks choose between
FORMATS = (torch.contiguous_format, torch.channels_last)


class MaskedResNet(nn.Module):
    """A ResNet of torchvision or timm with a mask token and the published head and loss."""

    def __init__(self, encoder: nn.Module, activation: str, spec: ResNetSpec) -> None:
        super().__init__()
        self.encoder, self.activation, self.patch_size = encoder, activation, spec.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, spec.width, 1, 1))
        self.decoder = published_head(spec, (spec.width << 3) * spec.expansion)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        encoder: Any = self.encoder
        x = encoder.bn1(encoder.conv1(image))
        x = encoder.maxpool(getattr(encoder, self.activation)(x))
        weight = mask.unsqueeze(1).type_as(x)
        x = x * (1.0 - weight) + self.mask_token.to(x.dtype) * weight
        x = encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))
        return published_loss(self.decoder(x), image, mask, self.patch_size)


def build_torchvision(spec: Spec) -> Peer:
    """torchvision's ResNet.

    Raises:
        Unavailable: torchvision is not installed, or has no such ResNet.
    """
    return _peer("torchvision", torchvision_resnet(spec), "relu", spec)


def build_timm(spec: Spec) -> Peer:
    """timm's ResNet.

    Raises:
        Unavailable: timm is not installed, or the model is no ResNet of the usual width.
    """
    resnet: Any = import_package("timm.models.resnet")
    spec = _resnet_of_usual_width(spec)
    encoder = resnet.ResNet(
        resnet.Bottleneck if spec.bottleneck else resnet.BasicBlock,
        spec.depths,
        num_classes=0,
        in_chans=spec.channels,
    )
    return _peer("timm", encoder, "act1", spec)


def torchvision_resnet(spec: Spec) -> nn.Module:
    """torchvision's ResNet of that architecture, without its last layer.

    Raises:
        Unavailable: torchvision is not installed, or has no such model.
    """
    spec = _resnet_of_usual_width(spec)
    if spec.channels != 3:
        raise Unavailable("torchvision's ResNet takes three channels only")
    resnet: Any = import_package("torchvision.models.resnet")
    block = resnet.Bottleneck if spec.bottleneck else resnet.BasicBlock
    model: Any = resnet.ResNet(block, list(spec.depths))
    model.fc = nn.Identity()
    module: nn.Module = model
    return module


def _resnet_of_usual_width(spec: Spec) -> ResNetSpec:
    if not isinstance(spec, ResNetSpec):
        raise Unavailable("only ResNets are paired with this package here")
    if spec.width != 64:
        raise Unavailable(f"its ResNets have a stem of width 64, not {spec.width}")
    return spec


def _peer(name: str, encoder: nn.Module, activation: str, spec: Spec) -> Peer:
    model = MaskedResNet(encoder, activation, _resnet_of_usual_width(spec))
    pairs = [
        Pair(theirs, take(f"encoder.{theirs}" if theirs == "mask_token" else theirs))
        for theirs, _ in model.named_parameters()
    ]
    note = f"{name}'s ResNet, token after its stem, published head"
    return Peer(name, spec, model, pairs, note=note, formats=FORMATS)
