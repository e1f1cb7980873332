"""SimMIM: hide part of an image, encode all of it, regress the hidden pixels with a linear head.

B batch, C channels, H W pixels, h w cells of the encoder's output, gh gw mask cells.
Source: Xie et al. 2021 (arXiv 2111.09886), section 3; microsoft/SimMIM models/simmim.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.layers import Backends
from simmim_kernels import linear_masked_l1_loss
from simmim_kernels.masked_l1_loss.reference import normalise_pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SimMIM(nn.Module):
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

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        norm_target: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm_target = norm_target
        self.loss_backend: str | None = None
        self.encoder_stride = encoder.spec.stride
        self.channels = encoder.spec.channels
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, self.channels * self.encoder_stride**2, 1),
            nn.PixelShuffle(self.encoder_stride),
        )
        rgb = self.channels == 3
        mean = mean or (IMAGENET_MEAN if rgb else (0.5,) * self.channels)
        std = std or (IMAGENET_STD if rgb else (0.25,) * self.channels)
        if len(mean) != self.channels or len(std) != self.channels:
            raise ValueError(
                f"mean has {len(mean)} and std {len(std)} values for {self.channels} channels"
            )
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def use_backend(self, name: str | None, attention: str | None = None) -> None:
        """Make every op use the backend `name`; None lets each op choose.

        Args:
            name: "triton", "native" or "reference".
            attention: another backend for attention and its projections, such as "xformers".
        """
        self.encoder.backends = Backends(name, attention or name)
        self.loss_backend = name

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B, C, H, W] → float32 (x / 255 - mean) / std; floating point passes unchanged."""
        if image.dtype == torch.uint8:
            return normalise_pixels(image, self.mean, self.std)
        if not image.dtype.is_floating_point:
            raise ValueError(f"images are uint8 or floating point, not {image.dtype}")
        return image

    def denormalise(self, image: Tensor) -> Tensor:
        """The inverse of `normalise`: float [B, C, H, W] → uint8, clipped to 0–255."""
        pixels = (image.float() * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)) * 255.0
        return pixels.round().clamp(0, 255).to(torch.uint8)

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

    def _features(self, image: Tensor, token_mask: Tensor | None) -> Tensor:
        features: Tensor = self.encoder(image, token_mask, **self._statistics(image))
        return features

    def _statistics(self, image: Tensor) -> dict[str, Tensor]:
        # bytes go into the ops as they are: each normalises those that it reads
        return {"mean": self.mean, "std": self.std} if image.dtype == torch.uint8 else {}
