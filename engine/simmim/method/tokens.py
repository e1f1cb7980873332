"""Token-wise SimMIM: hide single tokens of a plain ViT, and regress only their pixels.

B batch, C channels, H W pixels, D width, h w token grid, L = h·w, K hidden tokens of an image,
p side of a patch, P = C·p·p values of a patch in the order (colour, row, column).
Source: lightly-ai/lightly examples/pytorch/simmim.py and models/utils.py (random_token_mask);
kristi700/ViT-SSL vit_core/ssl/simmim. lightly orders a patch as (row, column, colour), so the rows
of its decoder must be permuted; those of ViT-SSL and microsoft/SimMIM need not be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.layers import init_linear
from simmim.backbone.stochastic_depth import of_samples
from simmim.config.bounds import bounded
from simmim.config.idle import SET, Idle
from simmim.config.sections import MethodConfig
from simmim.data.batch import Batch
from simmim.errors import ConfigError
from simmim.method.method import MaskingMethod
from simmim.model.image_model import MaskedImageModel
from simmim.model.masking import sample_mask
from simmim_kernels import linear_masked_l1_loss

Head = Literal["linear", "mlp"]
Loss = Literal["l1", "l2"]
Target = Literal["pixels", "normalised"]
Rounding = Literal["up", "down"]

DEEPEST_HEAD = 16


def num_hidden_tokens(num_tokens: int, ratio: float, rounding: Rounding) -> int:
    """How many tokens of an image are hidden.

    "up" keeps int(L · (1 - ratio)) tokens, as lightly counts, and "down" hides int(L · ratio), as
    ViT-SSL does; both products are computed in float64 and may lie slightly off an integer.
    """
    if rounding == "up":
        return num_tokens - int(num_tokens * (1 - ratio))
    return int(num_tokens * ratio)


class TokenSimMIM(MaskedImageModel):
    """An encoder, a head that sees hidden tokens only, and the mean error of their pixels.

    It takes the images of every `ImageModel` and the masks of every `MaskedImageModel`. A linear
    head has the names and the layout of SimMIM's decoder.

    Args:
        encoder: a backbone of `simmim.backbone` whose output cells are its tokens.
        head: "linear", or "mlp": linear layers with exact GELU between.
        mlp_hidden: width of the hidden layers of an "mlp" head; 0 takes the encoder's.
        mlp_depth: hidden layers of an "mlp" head, 1 to 16.
        loss: "l1", the mean absolute error, or "l2", the mean squared error.
        target: "pixels", normalised by mean and std, or "normalised", which also normalises every
            patch by its own mean and variance (facebookresearch/mae: over all P values, divisor
            P - 1, 1e-6 added to the variance).
        mean: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.5.
        std: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.25.

    Raises:
        ValueError: the output cells of the encoder are not its mask's tokens, or an argument has
            none of the values above.
    """

    kind = "tokens"

    def __init__(
        self,
        encoder: Encoder,
        *,
        head: Head = "linear",
        mlp_hidden: int = 0,
        mlp_depth: int = 1,
        loss: Loss = "l1",
        target: Target = "pixels",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        spec = encoder.spec
        if spec.stride != spec.patch_size:
            raise ValueError(
                f"an output cell of {spec.stride} px is no token of {spec.patch_size} px: token-"
                "wise masks need an encoder of one resolution, such as a ViT"
            )
        for name, value, known in (
            ("head", head, get_args(Head)),
            ("loss", loss, get_args(Loss)),
            ("target", target, get_args(Target)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value} is none of {', '.join(known)}")
        if not 1 <= mlp_depth <= DEEPEST_HEAD or mlp_hidden < 0:
            raise ValueError(
                f"mlp_depth={mlp_depth} must be between 1 and {DEEPEST_HEAD}, mlp_hidden="
                f"{mlp_hidden} at least 0"
            )
        self.head, self.mlp_hidden, self.mlp_depth = head, mlp_hidden, mlp_depth
        self.loss, self.target = loss, target
        self.loss_backend: str | None = None
        self.patch_size = spec.patch_size
        width, values = encoder.num_features, self.channels * self.patch_size**2
        layers: list[nn.Module] = [nn.Conv2d(width, values, 1), nn.PixelShuffle(self.patch_size)]
        if head == "mlp":
            hidden = mlp_hidden or width
            layers = []
            for inputs in [width, *[hidden] * (mlp_depth - 1)]:
                layers += [nn.Linear(inputs, hidden), nn.GELU()]
            layers.append(nn.Linear(hidden, values))
        self.decoder = nn.Sequential(*layers)
        self.decoder.apply(init_linear)

    @property
    def settings(self) -> dict[str, Any]:
        """See `ImageModel`."""
        names = ("head", "mlp_hidden", "mlp_depth", "loss", "target")
        return {name: getattr(self, name) for name in names}

    def trained_mask(self, mask: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """See `MaskedImageModel`; the unit is always one token."""
        return None if mask is None else {**mask, "unit": self.patch_size}

    def use_backend(self, name: str | None, attention: str | None = None) -> None:
        """See `ImageModel.use_backend`; the loss uses `name` too."""
        super().use_backend(name, attention)
        self.loss_backend = name

    def forward(self, image: Tensor, mask: Tensor, num_hidden: int | None = None) -> Tensor:
        """Scalar loss: the mean error over all values of the hidden patches; 0 if none is hidden.

        Args:
            image: [B, C, H, W], uint8 or normalised.
            mask: bool, on any grid of whole patches; True hides.
            num_hidden: number of hidden tokens in each image that hides any; None counts them,
                which waits for the device.
        """
        mask = self.token_mask(mask)
        features = self._features(image, mask)
        if self.head == "linear" and self.loss == "l1" and self.target == "pixels":
            weight, bias = self._linear_head()
            return linear_masked_l1_loss(
                features.permute(0, 2, 3, 1),
                weight,
                bias,
                image,
                mask,
                self.patch_size,
                **self._statistics(image),
                norm_target=None,
                backend=self.loss_backend,
            )
        places, present = _hidden_places(mask, num_hidden)
        prediction = self._predict(features, places)
        target = self._pixels(image, places)
        if self.target == "normalised":
            mean, deviation = _patch_statistics(target)
            target = (target - mean) / deviation
        # `where` before the error keeps absent tokens out of the gradient
        error = torch.where(present.unsqueeze(2), prediction - target, 0.0)
        error = error.abs() if self.loss == "l1" else error.square()
        return error.sum() / (present.sum() * target.shape[2]).clamp(min=1)

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image [B, C, H, W] in normalised units, with the prediction in its hidden patches.

        Visible patches have no prediction and do not change. With target "normalised" the
        prediction lacks the mean and deviation of a patch, which are taken from the image.
        """
        mask = self.token_mask(mask)
        places, present = _hidden_places(mask, None)
        prediction = self._predict(self._features(image, mask), places)
        original = self._pixels(image, places)
        if self.target == "normalised":
            mean, deviation = _patch_statistics(original)
            prediction = prediction * deviation + mean
        patches = torch.where(present.unsqueeze(2), prediction, original)
        out = self.normalise(image).float().clone(memory_format=torch.contiguous_format)
        p = self.patch_size
        self._cells(out)[self._index(places)] = patches.view(*places.shape, -1, p, p)
        return out

    def _linear_head(self) -> tuple[Tensor, Tensor | None]:
        head = self.decoder[0]
        assert isinstance(head, nn.Conv2d)
        return head.weight.flatten(1), head.bias

    def _predict(self, features: Tensor, places: Tensor) -> Tensor:
        """Apply the head to the tokens at `places`: [B, D, h, w], [B, K] → float32 [B, K, P]."""
        tokens = features.flatten(2).transpose(1, 2)
        tokens = tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        out = self.decoder(tokens) if self.head == "mlp" else F.linear(tokens, *self._linear_head())
        values: Tensor = out.float()
        return values

    def _pixels(self, image: Tensor, places: Tensor) -> Tensor:
        """Normalised pixels of patches: [B, K] → float32 [B, K, P]."""
        # bytes are gathered first: only the requested pixels become floating point
        return self.normalise(self._cells(image)[self._index(places)]).float().flatten(2)

    def _cells(self, image: Tensor) -> Tensor:
        """A view of the image as [B, C, h, p, w, p]."""
        (h, w), p = self.encoder.spec.grid, self.patch_size
        return image.view(*image.shape[:2], h, p, w, p)

    def _index(self, places: Tensor) -> tuple[Tensor | slice, ...]:
        """The index of patches in `_cells`: [B, K] → an index whose result is [B, K, C, p, p]."""
        everything, columns = slice(None), self.encoder.spec.grid[1]
        images = torch.arange(len(places), device=places.device).unsqueeze(1)
        return images, everything, places // columns, everything, places % columns, everything


def _patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and √(var + 1e-6) of every patch: [B, K, P] → [B, K, 1] each."""
    mean = pixels.mean(2, keepdim=True)
    variance = (pixels - mean).square().sum(2, keepdim=True) / (pixels.shape[2] - 1)
    return mean, (variance + 1e-6).sqrt()


def _hidden_places(mask: Tensor, num_hidden: int | None) -> tuple[Tensor, Tensor]:
    """Find the hidden tokens: bool [B, h, w] → int64 [B, K] ascending, bool [B, K] whether hidden.

    Images that hide fewer than K tokens are filled up with visible tokens.
    """
    hidden = mask.flatten(1)
    if num_hidden is None:
        num_hidden = int(hidden.sum(1).max()) if len(hidden) else 0
    places = (~hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_hidden]
    return places, hidden.gather(1, places)


@dataclass(frozen=True, kw_only=True)
class TokensConfig(MethodConfig):
    """Token-wise SimMIM."""

    name: str = "tokens"
    """Method."""
    head: Head = "linear"
    """What regresses pixels from hidden tokens: one linear layer, or an MLP with GELU."""
    mlp_hidden: int = bounded(0, low=0)
    """Width of the hidden layers of head = mlp. 0 takes the width of the encoder."""
    mlp_depth: int = bounded(1, low=1, high=DEEPEST_HEAD)
    """Number of hidden layers of head = mlp."""
    loss: Loss = "l1"
    """Loss: the mean absolute error (l1) or the mean squared error (l2)."""
    target: Target = "pixels"
    """Regress pixels, or each patch normalised by its own mean and variance, as MAE does."""
    rounding: Rounding = "up"
    """Hide L - int(L * (1 - ratio)) of L tokens (up), as lightly does, or int(L * ratio) (down)."""


class TokenMethod(MaskingMethod):
    """Token-wise SimMIM: `mask.ratio` of single tokens is hidden."""

    name = "tokens"
    Settings = TokensConfig
    settings: TokensConfig
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("mask.unit",), {"method.name": SET}),
        Idle(("method.mlp_hidden", "method.mlp_depth"), {"method.head": ("linear",)}),
    )
    Model = TokenSimMIM
    title = "token-wise SimMIM"
    paper = "https://arxiv.org/abs/2111.09886"
    purpose = "hide single tokens of a ViT, regress the pixels of those alone (L1 or L2)"

    @property
    def num_hidden(self) -> int:
        """Hidden tokens of every image."""
        ratio, rounding = self.config.mask.ratio, self.settings.rounding
        return num_hidden_tokens(math.prod(self.spec.grid), ratio, rounding)

    def check(self) -> None:
        """See `Method`."""
        spec = self.spec
        if spec.stride != spec.patch_size:
            raise ConfigError(
                f"model.name={self.config.model.name} has output cells of {spec.stride} px and "
                f"tokens of {spec.patch_size} px; method.name=tokens needs one resolution: a ViT"
            )
        if self.num_hidden < 1:
            raise ConfigError(
                f"mask.ratio={self.config.mask.ratio} hides none of {math.prod(spec.grid)} tokens"
            )

    def build(self, encoder: Encoder) -> TokenSimMIM:
        """See `Method`."""
        data, settings = self.config.data, self.settings
        return TokenSimMIM(
            encoder,
            head=settings.head,
            mlp_hidden=settings.mlp_hidden,
            mlp_depth=settings.mlp_depth,
            loss=settings.loss,
            target=settings.target,
            mean=data.mean,
            std=data.std,
        )

    def draw_mask(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """Draw the hidden tokens of samples, bool [B, h, w], from (seed, epoch, sample).

        Args:
            ids: int64 [B], ids of the samples; a negative id hides nothing.
            epochs: int64 [B], epochs of the samples.
        """
        spec = self.spec
        # sampling rounds its share of the units up, so half a token less than the count gives it
        share = (self.num_hidden - 0.5) / math.prod(spec.grid)
        return sample_mask(
            ids,
            epochs,
            spec.grid,
            patch_size=spec.patch_size,
            mask_unit=spec.patch_size,
            ratio=share,
            seed=self.config.seed,
            backend=self.config.kernels.backend,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Method`."""
        mask = self.draw_mask(batch.ids, batch.epochs)
        with of_samples(self.config.seed, batch.epochs, batch.ids):
            loss: Tensor = model(self.arrange(batch.image), mask, self.num_hidden)
        return loss
