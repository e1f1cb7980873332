"""Validation during a run: loss, PSNR and SSIM of images that are held out of training.

B batch, C channels, H W pixels.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simmim.config.check import micro_batch
from simmim.config.sections import Config
from simmim.data.batch import Batch
from simmim.data.one_pass import one_pass
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.data.unreadable import UnreadableImages
from simmim.data.views import CentreView
from simmim.distributed import World, all_reduce_sum
from simmim.errors import ConfigError, DataError, from_setting
from simmim.model.image_model import MaskedImageModel, evaluation_mode
from simmim.observers import say_where
from simmim.pictures.image_quality import SMALLEST, signal_to_noise, structural_similarity
from simmim.pictures.reconstruction import FixedSamples
from simmim.training import precision
from simmim.training.observer import PeriodicObserver, draw_picture
from simmim.training.run import Run


class MaskingMethod(Protocol):
    """What validation needs from a method; see `simmim.method.method.MaskingMethod`.

    The method's model is a `simmim.model.image_model.MaskedImageModel`.
    """

    config: Config

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch's images."""

    def arrange(self, image: Tensor) -> Tensor:
        """Rearrange the loader's uint8 [B, H, W, C] to [B, C, H, W]."""

    def draw_mask(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """The masks of samples, bool [B, gh, gw]."""


def open_validation(config: Config) -> Source:
    """The images that a run validates on.

    Raises:
        DataError: there are none; names the key.
    """
    with from_setting("validate.path"):
        return open_source(config.validate.path)


@dataclass(frozen=True)
class Measured:
    """The result of a validation.

    Attributes:
        images: number of images that could be read.
        loss: mean over the images of the training loss under their masks of epoch 0.
        psnr: peak signal-to-noise ratio in dB, from the mean squared error over all pixels of all
            images; infinite without any error.
        ssim: mean over the images of `simmim.pictures.image_quality.structural_similarity`.

    psnr and ssim compare an image with a copy on the 0–1 scale whose hidden pixels are predicted
    and clipped to 0 and 1. Visible pixels are copied, so they count as without error.
    """

    images: int
    loss: float
    psnr: float
    ssim: float


@torch.no_grad()
def validate(
    method: MaskingMethod,
    model: MaskedImageModel,
    source: Source,
    world: World,
    *,
    batch_size: int,
    report: Callable[[str], None] = print,
) -> Measured:
    """Measure a model once on every image of a source; processes share the images.

    Args:
        method: draws the masks and computes the loss.
        model: the model on the world's device; its mode is restored.
        source: the images.
        world: this process.
        batch_size: images per device.
        report: called with lines about unreadable images and replaced processes.

    Returns:
        The result, equal in every process.

    Raises:
        DataError: no image could be read.
    """
    config, unreadable = method.config, UnreadableImages(source, world)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    batches = one_pass(
        source,
        CentreView(config),
        world,
        batch_size=batch_size,
        workers=config.data.workers,
        timeout_s=config.data.timeout_s,
        report=report,
        note_problem=unreadable.note,
    )
    with evaluation_mode(model), closing(batches):
        for batch in batches:
            if batch.num_valid:
                sums += _measure(method, model, batch, world)
    all_reduce_sum(sums, world)
    problems = unreadable.agree()
    loss, error, similarity, images = sums.tolist()
    if not images:
        why = f" ({unreadable.describe(problems[0])})" if problems else ""
        raise DataError(f"validate.path: none of its images could be read{why}")
    unreadable.report(problems, report, "unreadable, not validated", len(source.names))
    values = images * math.prod(config.image_size) * config.data.channels
    return Measured(
        int(images), loss / images, signal_to_noise(error / values), similarity / images
    )


def _measure(method: MaskingMethod, model: MaskedImageModel, batch: Batch, world: World) -> Tensor:
    """Sums over a batch of loss, squared error and similarity, and its images: float64 [4]."""
    image = method.arrange(batch.image)
    mask = method.draw_mask(batch.ids, batch.epochs)  # of epoch 0
    with precision.autocast(world.device, method.config.train.precision):
        loss = method.loss(model, batch)
        made = model.completed(image, mask)
    original = image / 255.0
    present = batch.ids >= 0
    error = (made - original).double().square().sum(dim=(1, 2, 3))
    similarity = structural_similarity(made, original)
    return torch.stack(
        [
            loss.double() * batch.num_valid,
            (error * present).sum(),
            (similarity * present).sum(),
            present.sum().double(),
        ]
    )


class Validation(PeriodicObserver):
    """Validates during the run; see `simmim.training.observer.PeriodicObserver`.

    Every validation writes a row of validations.jsonl, a line of the log and a picture of held-out
    images. If a stop interrupts a validation, it is made when the run resumes.

    Args:
        method: the run's method.
        world: this process.

    Raises:
        ConfigError: images are too small for SSIM.
        DataError: there are no images.
    """

    def __init__(self, method: MaskingMethod, world: World) -> None:
        config = method.config
        super().__init__(config.validate.every_epochs, world)
        if min(config.image_size) < SMALLEST:
            raise ConfigError(
                f"validate.path: SSIM needs images of at least {SMALLEST} px, data.image_size is "
                f"{min(config.image_size)}"
            )
        self.method, self.source = method, open_validation(config)
        self.batch_size = config.validate.batch_size or micro_batch(config, world.size)
        self.samples: FixedSamples | None = None
        if world.is_main and config.validate.pictures:
            self.samples = FixedSamples(
                self.source, config, method.draw_mask, config.validate.pictures
            )

    def records(self, run: Run) -> Path:
        """See `PeriodicObserver`."""
        return run.folder.validations

    def measure(self, run: Run) -> Measured:
        """Validate; see `validate`."""
        return validate(
            self.method,
            masked_model(run),
            self.source,
            self.world,
            batch_size=self.batch_size,
            report=run.log.warn,
        )

    def row(self, measurement: Measured) -> dict[str, Any]:
        """See `PeriodicObserver`."""
        return vars(measurement)

    def tell(self, run: Run, measurement: Measured, row: dict[str, Any]) -> None:
        """Write the line and the picture."""
        run.log.info(
            f"step {run.step}: validation loss {measurement.loss:.4f}, PSNR {measurement.psnr:.2f} "
            f"dB, SSIM {measurement.ssim:.4f} on {measurement.images:,} held-out images"
        )
        if self.samples is not None:
            draw_picture(
                run, self.samples.draw, run.model, run.folder.validation_pictures, "validation"
            )

    def finish(self, run: Run) -> None:
        """Say where the pictures are."""
        say_where(run, "reconstructions of held-out images", run.folder.validation_pictures)


def masked_model(run: Run) -> MaskedImageModel:
    """The model of a run that masks images."""
    assert isinstance(run.model, MaskedImageModel)
    return run.model
