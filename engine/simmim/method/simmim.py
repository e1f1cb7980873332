"""SimMIM: hide part of an image, encode all of it, regress the hidden pixels with a linear head.

B batch, C channels, H W pixels, h w cells of the encoder's output, gh gw mask cells.
Source: Xie et al. 2021 (arXiv 2111.09886), section 3; microsoft/SimMIM models/simmim.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.stochastic_depth import of_samples
from simmim.config.check import check_mask
from simmim.config.sections import MethodConfig
from simmim.data.batch import Batch
from simmim.errors import ConfigError
from simmim.method.method import MaskingMethod
from simmim.model.image_model import MaskedImageModel
from simmim.model.masking import sample_mask
from simmim.training.running_statistics import has_batch_norm
from simmim_kernels import linear_masked_l1_loss


class SimMIM(MaskedImageModel):
    """An encoder, a linear decoder, and the masked L1 loss.

    Images are float tensors that are already normalised, or uint8 tensors (0–255) that the model
    normalises with its own mean and std. A mask is bool, [B, gh, gw] on any grid whose cells are
    whole patches (token grid or coarser); True hides.

    Args:
        encoder: a backbone of `simmim.backbone`.
        norm_target: odd window side in pixels over which the target is normalised (47 as
            published for SwinV2); None regresses the normalised pixels.
        mean: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.5.
        std: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.25.
    """

    kind = "simmim"
    settings_are_flat = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        norm_target: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        self.norm_target = norm_target
        self.loss_backend: str | None = None
        self.encoder_stride = encoder.spec.stride
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, self.channels * self.encoder_stride**2, 1),
            nn.PixelShuffle(self.encoder_stride),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """See `ImageModel`."""
        return {"norm_target": self.norm_target}

    def use_backend(self, name: str | None, attention: str | None = None) -> None:
        """See `ImageModel.use_backend`; the loss uses `name` too."""
        super().use_backend(name, attention)
        self.loss_backend = name

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Prediction of every pixel, [B, C, H, W], in normalised units."""
        prediction: Tensor = self.decoder(self.encode(image, mask))
        return prediction

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Scalar loss: mean absolute error over the hidden pixels, in normalised units.

        The loss applies the head, and only to cells with hidden pixels.
        """
        features = self._features(image, self.token_mask(mask))
        head = self.decoder[0]
        assert isinstance(head, nn.Conv2d)
        return linear_masked_l1_loss(
            features.permute(0, 2, 3, 1),
            head.weight,
            head.bias,
            image,
            mask.to(torch.bool),
            self.encoder_stride,
            **self._statistics(image),
            norm_target=self.norm_target,
            backend=self.loss_backend,
        )


@dataclass(frozen=True, kw_only=True)
class SimMIMConfig(MethodConfig):
    """SimMIM; [mask] says what is hidden."""

    norm_target: int = 0
    """Odd side, in pixels, of the window that normalises the target. 0 does not normalise."""


class SimMIMMethod(MaskingMethod):
    """SimMIM: [mask] says what is hidden, [method] what is regressed."""

    name = "simmim"
    Settings = SimMIMConfig
    settings: SimMIMConfig
    Model = SimMIM
    title = "SimMIM"
    paper = "https://arxiv.org/abs/2111.09886"
    purpose = "hide mask units of 32 pixels, regress their pixels with a linear head (L1)"

    def check(self) -> None:
        """See `Method`."""
        check_mask(self.config)
        window = self.settings.norm_target
        if window and (window < 3 or window % 2 == 0):
            raise ConfigError(f"method.norm_target={window} must be odd and at least 3, or 0")

    def build(self, encoder: Encoder) -> SimMIM:
        """See `Method`."""
        data = self.config.data
        norm_target = self.settings.norm_target or None
        return SimMIM(encoder, norm_target=norm_target, mean=data.mean, std=data.std)

    def draw_mask(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """Draw the mask units of samples, bool [B, gh, gw], from (seed, epoch, sample).

        Args:
            ids: int64 [B], ids of the samples.
            epochs: int64 [B], epochs of the samples.
        """
        config = self.config
        return sample_mask(
            ids,
            epochs,
            self.spec.grid,
            patch_size=self.spec.patch_size,
            mask_unit=config.mask.unit,
            ratio=config.mask.ratio,
            seed=config.seed,
            backend=config.kernels.backend,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Method`."""
        if batch.num_valid < len(batch.ids) and has_batch_norm(model):
            # they hide nothing, but batch norms see their zeros
            batch = batch.without_empty_slots()
        image, mask = self.arrange(batch.image), self.draw_mask(batch.ids, batch.epochs)
        with of_samples(self.config.seed, batch.epochs, batch.ids):
            loss: Tensor = model(image, mask)
        return loss
