"""SimSiam: one network sees two views of an image, and each predicts the other, held constant.

B batch, C channels, H W pixels, D width of the projection.
Source: Chen and He 2020 (arXiv 2011.10566); facebookresearch/simsiam simsiam/builder.py and
main_simsiam.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.stochastic_depth import of_samples, of_view
from simmim.config.bounds import Bounds, bounded
from simmim.config.check import micro_batch
from simmim.config.idle import SET, Idle
from simmim.config.sections import MethodConfig
from simmim.data.augment import Augmentation
from simmim.data.batch import Batch
from simmim.data.distortion import Distortion, distort, draw
from simmim.data.source import Source
from simmim.data.views import VIEWS, TwoViews
from simmim.environment import Launch
from simmim.errors import ConfigError
from simmim.method.method import Method
from simmim.model.image_model import ImageModel
from simmim.pictures.neighbours import ViewPictures
from simmim.training.observer import Draw

# Share of the healthy deviation of features below which a run counts as collapsing.
COLLAPSED_SHARE = 0.3

# Projections shorter than this share of a healthy length count as this long: if all features are
# equal, the last batch norm gives rounding noise, and noise points in all directions.
SHORTEST_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig(Distortion, MethodConfig):
    """SimSiam; crops and flips are those of [data]."""

    name: str = "simsiam"
    """Method."""
    projector_width: int = bounded(2048, low=1)
    """Width of the projection. Hidden layers are as wide as the features, as published."""
    projector_layers: int = bounded(3, low=1, high=16)
    """Linear layers of the projector, each with a batch norm."""
    predictor_width: int = bounded(512, low=1)
    """Width of the predictor's hidden layer."""
    fix_predictor_lr: bool = True
    """Keep the predictor at the peak learning rate, which gave the best published results."""


class SimSiam(ImageModel):
    """An encoder, a projector over the mean of its output cells, a predictor, and the loss.

    In evaluation mode, the loss is computed with running statistics.

    Args:
        encoder: a backbone of `simmim.backbone`; its mask token is taken away.
        projector_width: D.
        projector_layers: linear layers of the projector, at least 1.
        predictor_width: width of the predictor's hidden layer.
        mean: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.5.
        std: per channel on the 0–1 scale; ImageNet's for 3 channels, else 0.25.

    Attributes:
        feature_std: scalar on the device, from the last training forward: the standard deviation
            over the batch of the projections, scaled to length 1, as a mean over D. It is 1/√D if
            they point in all directions, and 0 if they are all equal.
    """

    kind = "simsiam"
    feature_std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        projector_width: int = 2048,
        projector_layers: int = 3,
        predictor_width: int = 512,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        self._settings = {
            "projector_width": projector_width,
            "projector_layers": projector_layers,
            "predictor_width": predictor_width,
        }
        encoder.mask_token = None  # nothing is hidden; DDP would wait for its gradient
        width = encoder.num_features
        layers: list[nn.Module] = []
        for _ in range(projector_layers - 1):
            layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(True)]
        last = nn.Linear(width, projector_width)
        assert last.bias is not None
        # As published: the norm after it removes the bias again, and decay would change only the
        # running mean.
        last.bias.requires_grad_(False)
        self.projector = nn.Sequential(*layers, last, nn.BatchNorm1d(projector_width, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(projector_width, predictor_width, bias=False),
            nn.BatchNorm1d(predictor_width),
            nn.ReLU(True),
            nn.Linear(predictor_width, projector_width),
        )
        self.register_buffer("feature_std", torch.zeros(()), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """See `ImageModel`."""
        return dict(self._settings)

    def project(self, image: Tensor) -> Tensor:
        """Projections z of images [B, C, H, W], uint8 or normalised: [B, D]."""
        projection: Tensor = self.projector(self.encode(image).mean((2, 3)))
        return projection

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        """Scalar loss of two views [B, C, H, W] of the same images; training needs 2 images.

        The views go through every batch norm one after the other, as published.
        """
        z_a = self.project(view_a)
        with of_view(1):
            z_b = self.project(view_b)
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        if self.training:
            self._measure(z_a.detach(), z_b.detach())
        return negative_cosine(p_a, p_b, z_a, z_b)

    @torch.no_grad()
    def _measure(self, *projections: Tensor) -> None:
        shortest = SHORTEST_SHARE * math.sqrt(projections[0].shape[1])
        for number, z in enumerate(projections):
            z = z.float()
            directions = z / z.norm(dim=1, keepdim=True).clamp(min=shortest)
            std = directions.std(0).mean()
            self.feature_std.lerp_(std.to(self.feature_std.dtype), 1 / (number + 1))


def negative_cosine(p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
    """-(mean cos(p_a, z_b) + mean cos(p_b, z_a)) / 2; no gradient goes to z.

    It is computed in float32 with PyTorch's own operations: at [256, 2048] they take less than a
    thousandth of a ResNet-50's step, so a fused op could save nothing.

    Args:
        p_a: predictions from the first view, [B, D].
        p_b: predictions from the second view, [B, D].
        z_a: projections of the first view, [B, D].
        z_b: projections of the second view, [B, D].
    """
    towards_b = F.cosine_similarity(p_a.float(), z_b.detach().float()).mean()
    towards_a = F.cosine_similarity(p_b.float(), z_a.detach().float()).mean()
    return -(towards_b + towards_a) / 2


class SimSiamMethod(Method):
    """SimSiam: [method] gives heads, colour and blur; [data] gives crops and flips."""

    name = "simsiam"
    Settings = SimSiamConfig
    settings: SimSiamConfig
    idle = (*Method.idle, Idle(("optim.decay_position_tables",), {"method.name": SET}))
    Model = SimSiam
    title = "SimSiam"
    paper = "https://arxiv.org/abs/2011.10566"
    purpose = "two views of every image predict each other through one network (negative cosine)"

    def check(self) -> None:
        """See `Method`."""
        settings, channels = self.settings, self.config.data.channels
        Bounds(0, 0.5).check("method.jitter's hue", settings.jitter[3])
        if channels not in (1, 3) and (settings.jitter_probability or settings.grey):
            raise ConfigError(
                f"images of data.channels={channels} have no colour to jitter: set "
                "--method.jitter_probability=0 --method.grey=0"
            )
        if micro_batch(self.config, Launch.of_environment().size) < 2:
            raise ConfigError(
                f"train.batch_size={self.config.train.batch_size} leaves 1 image per process and "
                "backward pass: the batch norms of SimSiam need at least 2"
            )

    def build(self, encoder: Encoder) -> SimSiam:
        """See `Method`."""
        data, settings = self.config.data, self.settings
        return SimSiam(
            encoder,
            projector_width=settings.projector_width,
            projector_layers=settings.projector_layers,
            predictor_width=settings.predictor_width,
            mean=data.mean,
            std=data.std,
        )

    def view(self) -> TwoViews:
        """Two crops of every image; colour and blur follow on the device."""
        data = self.config.data
        return TwoViews(
            Augmentation(
                self.config.image_size, data.crop_scale, data.crop_ratio, data.flip, data.channels
            ),
            self.config.seed,
            max_pixels=data.max_pixels,
            value_range=data.value_range,
        )

    @torch.no_grad()
    def distorted(self, image: Tensor, ids: Tensor, epochs: Tensor) -> list[Tensor]:
        """Distort both crops for the model: uint8 [B, 2, H, W, C] → two of uint8 [B, C, H, W]."""
        views = []
        for view in range(VIEWS):
            draws = draw(ids, epochs, view, self.config.seed, self.settings)
            pixels = distort(image[:, view], draws, self.settings.blur_sigma[1])
            if self.config.channels_last_on(image.device.type):
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            views.append(pixels)
        return views

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Method`; empty slots take no part in batch norms."""
        batch = batch.without_empty_slots(2)  # batch norms refuse one image alone
        views = self.distorted(batch.image, batch.ids, batch.epochs)
        with of_samples(self.config.seed, batch.epochs, batch.ids):
            loss: Tensor = model(*views)
        # one image without others has nothing to differ from
        return loss if batch.num_valid > 1 else loss * 0.0

    def parameter_groups(self, model: ImageModel) -> list[dict[str, Any]]:
        """As published, all that trains is decayed; the predictor may keep its peak rate."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = []
        for of_predictor in (False, True):
            chosen = [(n, p) for n, p in named if n.startswith("predictor.") == of_predictor]
            groups.append(
                {
                    "params": [parameter for _, parameter in chosen],
                    "names": [name for name, _ in chosen],
                    "weight_decay": self.config.optim.weight_decay,
                }
            )
        groups[1]["fixed_lr"] = self.settings.fix_predictor_lr
        return groups

    def measures(self, model: ImageModel) -> dict[str, Tensor]:
        """`feature_std`, and its share of 1/√D, which features in all directions have."""
        assert isinstance(model, SimSiam)
        healthy = 1 / math.sqrt(self.settings.projector_width)
        return {"feature_std": model.feature_std, "feature_std_share": model.feature_std / healthy}

    def warning(self, measures: dict[str, float]) -> str:
        """Warn of a collapse, in which all images have the same features."""
        share = measures["feature_std_share"]
        if not share < COLLAPSED_SHARE:
            return ""
        return (
            f"the features collapse: their deviation over the batch is {share:.0%} of that of "
            "healthy ones, and a loss near -1 then means nothing. Try a lower --optim.lr, a larger "
            "--train.batch_size, --train.sync_batch_norm=true where several processes train; and "
            "a projector and predictor as published ([method] left at its defaults)"
        )

    def picture(self, source: Source) -> Draw:
        """Draw the views of the same images, and the images nearest to each."""
        return ViewPictures(source, self.config, self.view(), self.distorted).draw
