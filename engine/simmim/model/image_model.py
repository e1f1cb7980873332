"""Bases of all models: an encoder, and images that it normalises with its own statistics.

B batch, C channels, H W pixels, D width, h w cells of the encoder's output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.layers import Backends
from simmim_kernels.masked_l1_loss.reference import local_statistics, normalise_pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageModel(nn.Module):
    """An encoder of images.

    Images are float tensors that are already normalised, or uint8 tensors (0–255) that the model
    normalises with its own mean and std.

    Args:
        encoder: a backbone of `simmim.backbone`.
        mean: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.5.
        std: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.25.

    Raises:
        ValueError: `mean` or `std` does not have one value per channel.
    """

    # how a weights file names this kind of model: for the models of a method, by the method's name
    kind: ClassVar[str] = "encoder"

    # whether the settings stand beside the other values of a weights file, as those of the two
    # oldest kinds do, and not in a table of their own
    settings_are_flat: ClassVar[bool] = False

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.channels = encoder.spec.channels
        rgb = self.channels == 3
        mean = mean or (IMAGENET_MEAN if rgb else (0.5,) * self.channels)
        std = std or (IMAGENET_STD if rgb else (0.25,) * self.channels)
        if len(mean) != self.channels or len(std) != self.channels:
            raise ValueError(
                f"mean has {len(mean)} and std {len(std)} values for {self.channels} channels"
            )
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The plain arguments that rebuild the model, in addition to encoder, mean and std."""
        return {}

    def use_backend(self, name: str | None, attention: str | None = None) -> None:
        """Make every op use the backend `name`; None lets each op choose.

        Args:
            name: "triton", "native" or "reference".
            attention: another backend for attention and its projections, such as "xformers".
        """
        self.encoder.backends = Backends(name, attention or name)

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

    def encode(self, image: Tensor) -> Tensor:
        """Feature map of the image, [B, D, h, w]."""
        return self._features(image, None)

    def _features(self, image: Tensor, token_mask: Tensor | None) -> Tensor:
        features: Tensor = self.encoder(image, token_mask, **self._statistics(image))
        return features

    def _statistics(self, image: Tensor) -> dict[str, Tensor]:
        # bytes go into the ops as they are, and each op normalises those that it reads
        return {"mean": self.mean, "std": self.std} if image.dtype == torch.uint8 else {}


class MaskedImageModel(ImageModel):
    """A model that sees part of an image and predicts the rest.

    A mask is bool, [B, gh, gw] on any grid whose cells are whole patches (token grid or coarser);
    True hides.

    Attributes:
        norm_target: odd window side in pixels over which the target is normalised; None where
            `reconstruct` gives the image itself.
    """

    norm_target: int | None = None

    def trained_mask(self, mask: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """What a weights file says about the configured mask: unit in pixels, and ratio."""
        return mask

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
        """Feature map of the image, [B, D, h, w]; the mask token replaces hidden tokens."""
        return self._features(image, None if mask is None else self.token_mask(mask))

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Prediction of every pixel, [B, C, H, W], in normalised units."""
        raise NotImplementedError

    def predicted_pixels(self, image: Tensor, mask: Tensor) -> Tensor:
        """`reconstruct` with the target's normalisation undone: float32 [B, C, H, W].

        Args:
            image: uint8 or normalised, [B, C, H, W].
            mask: bool [B, gh, gw].
        """
        prediction = self.reconstruct(image, mask).float()
        if self.norm_target is None:
            return prediction
        # the prediction lacks local mean and deviation, so those of the original are taken
        mean, deviation = local_statistics(self.normalise(image), self.norm_target)
        return prediction * deviation + mean

    def pixel_mask(self, mask: Tensor) -> Tensor:
        """A mask on any grid of whole patches → bool [B, 1, H, W].

        Raises:
            ValueError: see `token_mask`.
        """
        patch = self.encoder.spec.patch_size
        hidden = self.token_mask(mask).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        return hidden.unsqueeze(1)

    def completed(self, image: Tensor, mask: Tensor) -> Tensor:
        """Images with predicted hidden pixels, float32 [B, C, H, W] on the 0–1 scale.

        Args:
            image: uint8 [B, C, H, W].
            mask: bool [B, gh, gw], True hides.
        """
        prediction = self.predicted_pixels(image, mask)
        prediction = prediction * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        return torch.where(self.pixel_mask(mask), prediction.clamp(0.0, 1.0), image / 255.0)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and afterwards into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
