"""SimSiam, assembled from the parts that other packages supply.

Models are called as model(view, other view) → loss, on normalised views [B, C, H, W].
Source: lightly-ai/lightly examples/pytorch/simsiam.py; layouts of lightly 1.6.
"""

import re
from typing import Any

from torch import Tensor, nn

from bench.peers.convnet import FORMATS, torchvision_resnet
from bench.peers.packages import import_lightly
from bench.peers.peer import Pair, Peer, take
from simmim.backbone.build import Spec
from simmim.backbone.resnet import ResNetSpec
from simmim.method.simsiam import SimSiamConfig


class LightlySimSiam(nn.Module):
    """A backbone with lightly's heads and loss."""

    def __init__(self, backbone: nn.Module, width: int, heads: Any, losses: Any) -> None:
        super().__init__()
        settings = SimSiamConfig()
        self.backbone, self.criterion = backbone, losses.NegativeCosineSimilarity()
        outputs = settings.projector_width
        self.projection_head = heads.SimSiamProjectionHead(width, width, outputs)
        self.prediction_head = heads.SimSiamPredictionHead(
            outputs, settings.predictor_width, outputs
        )

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        z, p = self._predict(view)
        other_z, other_p = self._predict(other)
        loss: Tensor = 0.5 * (self.criterion(p, other_z) + self.criterion(other_p, z))
        return loss

    def _predict(self, view: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projection_head(self.backbone(view).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)


def build_lightly(spec: Spec) -> Peer:
    """lightly's heads and loss on torchvision's ResNet.

    Raises:
        Unavailable: lightly or torchvision is not installed, or the model is no ResNet.
    """
    backbone = torchvision_resnet(spec)
    assert isinstance(spec, ResNetSpec)
    heads, losses = import_lightly("models.modules"), import_lightly("loss")
    model = LightlySimSiam(backbone, (spec.width << 3) * spec.expansion, heads, losses)
    pairs = [Pair(name, take(_our_name(name))) for name, _ in model.named_parameters()]
    note = "lightly's heads and loss on torchvision's ResNet"
    return Peer("lightly", spec, model, pairs, note=note, formats=FORMATS)


def _our_name(theirs: str) -> str:
    name = re.sub(r"^backbone\.", "encoder.", theirs)
    name = re.sub(r"^projection_head\.layers\.", "projector.", name)
    return re.sub(r"^prediction_head\.layers\.", "predictor.", name)
