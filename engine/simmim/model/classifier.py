"""Image classification with a pre-trained encoder: mean of the patch tokens, norm, linear head.

B batch, C channels, H W pixels, D width, K classes.
Source: microsoft/SimMIM models/swin_transformer.py and models/vision_transformer.py (mean pooling).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.convnet import ConvNet
from simmim.backbone.layers import init_linear
from simmim.backbone.vit import ViT
from simmim.model.image_model import ImageModel

# As published: the head of a ViT starts with almost equal logits.
VIT_HEAD_SCALE = 0.001


class Classifier(ImageModel):
    """An encoder without a mask token, and a linear head over the mean of its output cells.

    A Swin norms tokens before their mean is taken. A ViT norms the mean (`fc_norm`), and its
    encoder then has no final norm. Both are as published. A ConvNeXt norms the mean too, as its
    authors do, and a ResNet norms nothing.

    Args:
        encoder: a backbone of `simmim.backbone`; its mask token is removed.
        classes: the name of every class, in the order of the head's rows.
        mean: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.5.
        std: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.25.
        margin: how prediction scales and crops images, see
            `simmim.data.finetune_views.EvaluationView`.
    """

    kind = "classifier"
    settings_are_flat = True

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        margin: float | None = None,
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        if not classes:
            raise ValueError("a classifier needs at least one class")
        self.classes, self.margin = tuple(classes), margin
        encoder.mask_token = None  # nothing is hidden; DDP would wait for its gradient
        self.fc_norm: nn.Module = nn.Identity()
        self.head = nn.Linear(encoder.num_features, len(self.classes))
        init_linear(self.head)
        if isinstance(encoder, ConvNet) and encoder.spec.pooled_norm_eps:
            self.fc_norm = nn.LayerNorm(encoder.num_features, encoder.spec.pooled_norm_eps)
        if isinstance(encoder, ViT):
            if not encoder.spec.final_norm:
                self.fc_norm = nn.LayerNorm(encoder.num_features, encoder.spec.norm_eps)
            init_linear(self.head, bound=0.02)
            with torch.no_grad():
                self.head.weight.mul_(VIT_HEAD_SCALE)

    @property
    def settings(self) -> dict[str, Any]:
        """See `ImageModel`."""
        return {"classes": self.classes, "margin": self.margin}

    def pool(self, image: Tensor) -> Tensor:
        """The head's input for every image, [B, D]."""
        pooled: Tensor = self.fc_norm(self.encode(image).flatten(2).mean(2))
        return pooled

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W], uint8 or normalised."""
        logits: Tensor = self.head(self.pool(image))
        return logits


def numbered_classes(count: int) -> tuple[str, ...]:
    """Names for classes that have none: their numbers, from 0."""
    return tuple(str(number) for number in range(count))
