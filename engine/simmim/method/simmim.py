"""SimMIM: hide part of an image, encode all of it, regress the hidden pixels with a linear head.

B batch, C channels, H W pixels, h w cells of the encoder's output, gh gw mask cells.
Source: Xie et al. 2021 (arXiv 2111.09886), section 3; microsoft/SimMIM models/simmim.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.method.images import ImageModel
from simmim_kernels import linear_masked_l1_loss


class SimMIM(ImageModel):
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

    def use_backend(self, name: str | None, attention: str | None = None) -> None:
        """See `ImageModel.use_backend`; the loss takes `name` too."""
        super().use_backend(name, attention)
        self.loss_backend = name

    def token_mask(self, mask: Tensor) -> Tensor:
        """A mask on any grid of whole patches → bool on the encoder's token grid.

        Raises:
            ValueError: the token grid is no multiple of the mask's grid.
        """
        height, width = self.encoder.spec.grid
        if mask.dim() != 3 or height % mask.shape[1] or width % mask.shape[2]:
            raise ValueError(
                f"mask {tuple(mask.shape)} must be [B, gh, gw] with gh dividing {height} and gw "
                f"dividing {width} (the token grid)"
            )
        mask = mask.to(torch.bool)
        rows, columns = height // mask.shape[1], width // mask.shape[2]
        if rows > 1:
            mask = mask.repeat_interleave(rows, 1)
        if columns > 1:
            mask = mask.repeat_interleave(columns, 2)
        return mask

    def encode(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feature map of the image, [B, D, h, w]; hidden tokens see the mask token instead."""
        return self._features(image, None if mask is None else self.token_mask(mask))

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Prediction of every pixel, [B, C, H, W], in normalised units."""
        prediction: Tensor = self.decoder(self.encode(image, mask))
        return prediction

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Scalar loss: mean absolute error over the hidden pixels, in normalised units.

        The head is applied by the loss, to the cells with hidden pixels alone.
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
