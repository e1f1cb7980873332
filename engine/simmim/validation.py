"""Validation as a run goes on: loss, PSNR and SSIM of images that are held out of training.

B batch, C channels, H W pixels.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim import files, precision
from simmim.config import Config, ConfigError, micro_batch
from simmim.data.augment import centre_view
from simmim.data.decode import decode
from simmim.data.loader import Batch, Loader
from simmim.data.one_pass import one_pass
from simmim.data.source import DataError, Source, open_source
from simmim.distributed import World, all_reduce_sum, broadcast_object, gather_objects
from simmim.errors import RunError
from simmim.image_quality import SMALLEST, signal_to_noise, structural_similarity
from simmim.method.images import MaskedImageModel
from simmim.observer import Observer
from simmim.pictures import Pictures
from simmim.reconstruct import FixedSamples, save_picture
from simmim.validation_config import ValidateConfig
from simmim_kernels.masked_l1_loss.reference import local_statistics

if TYPE_CHECKING:
    from simmim.loop import Loop

VALIDATIONS_FILE = "validations.jsonl"

# In the run folder: reconstructions of held-out images.
PICTURES_FOLDER = "validation"

# Unreadable images that the log names each time; the rest is counted.
NAMED_UNREADABLE = 5


class MaskingMethod(Protocol):
    """What validation asks of a method; `simmim.method.method.Method` tells more of it.

    Its module is a `simmim.method.images.MaskedImageModel`.
    """

    config: Config

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch's images."""

    def arrange(self, image: Tensor) -> Tensor:
        """uint8 [B, H, W, C] as they travel → [B, C, H, W]."""

    def draw_mask(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """The masks of samples, bool [B, gh, gw]."""


def open_validation(config: Config) -> Source:
    """The images that a run validates on.

    Raises:
        DataError: there are none; names the key.
    """
    try:
        return open_source(config.validate.path)
    except DataError as error:
        raise DataError(str(error).replace("data.path=", "validate.path=")) from None


class CentreView:
    """The largest central crop of every image, uint8 [H, W, C]; nothing is drawn; a `View`.

    Args:
        config: of the run.
    """

    dtype = "uint8"

    def __init__(self, config: Config) -> None:
        self.data, self.size = config.data, config.image_size
        self.shape: tuple[int, ...] = (*config.image_size, config.data.channels)

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        """See `simmim.data.producer.View`; the same in every epoch."""
        image = decode(
            data,
            self.data.channels,
            max_pixels=self.data.max_pixels,
            value_range=self.data.value_range,
        )
        out[...] = centre_view(image, self.size)


@dataclass(frozen=True)
class Measured:
    """What a validation found.

    Attributes:
        images: that could be read.
        loss: mean over the images of the training loss under their masks of epoch 0.
        psnr: peak signal-to-noise ratio in dB, from the mean squared error over all pixels of all
            images; infinite without any error.
        ssim: mean over the images of `simmim.image_quality.structural_similarity`.

    For psnr and ssim an image is its hidden pixels as the model predicts them, cut off at 0 and 1,
    beside its visible pixels as they are: on the 0–1 scale, visible pixels count as without error.
    """

    images: int
    loss: float
    psnr: float
    ssim: float


def reconstructed(model: MaskedImageModel, image: Tensor, mask: Tensor) -> Tensor:
    """Images with their hidden pixels as predicted, float32 [B, C, H, W] on the 0–1 scale.

    Args:
        model: on the images' device.
        image: uint8 [B, C, H, W].
        mask: bool [B, gh, gw], True hides.
    """
    prediction = model.reconstruct(image, mask).float()
    if model.norm_target is not None:
        # a normalised target is predicted up to its local mean and deviation: take the original's
        mean, deviation = local_statistics(model.normalise(image), model.norm_target)
        prediction = prediction * deviation + mean
    prediction = prediction * model.std.view(-1, 1, 1) + model.mean.view(-1, 1, 1)
    patch = model.encoder.spec.patch_size
    hidden = model.token_mask(mask).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return torch.where(hidden.unsqueeze(1), prediction.clamp(0.0, 1.0), image / 255.0)


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
    """Measure a model on every image of a source once, shared among processes.

    Args:
        method: draws the masks and computes the loss.
        model: on the world's device; left in the mode it was in.
        source: images.
        world: this process.
        batch_size: images per device.
        report: told, in lines, of images that cannot be read and of replaced processes.

    Returns:
        The same in every process.

    Raises:
        DataError: no image could be read.
    """
    config, unreadable = method.config, list[tuple[int, str]]()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    batches = one_pass(
        source,
        CentreView(config),
        world,
        batch_size=batch_size,
        workers=config.data.workers,
        timeout_s=config.data.timeout_s,
        report=report,
        note_problem=lambda sample, reason: unreadable.append((sample, reason)),
    )
    training = model.training
    model.eval()
    try:
        with closing(batches):
            for batch in batches:
                if batch.num_valid:
                    sums += _measure(method, model, batch, world)
    finally:
        model.train(training)
    all_reduce_sum(sums, world)
    found = sorted(pair for pairs in gather_objects(unreadable, world) for pair in pairs)
    loss, error, similarity, images = sums.tolist()
    if not images:
        sample, reason = found[0] if found else (None, "")
        why = "" if sample is None else f" ({source.names[sample]}: {reason})"
        raise DataError(f"validate.path: none of its images could be read{why}")
    for sample, reason in found[:NAMED_UNREADABLE] if world.is_main else []:
        report(f"unreadable, not validated: {source.names[sample]}: {reason}")
    if world.is_main and len(found) > NAMED_UNREADABLE:
        report(f"unreadable, not validated: {len(found)} of {len(source.names)} images in all")
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
        made = reconstructed(model, image, mask)
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


class Validation(Observer):
    """Validates as the run goes on; see `simmim.loop.Observer`.

    Every validation is a row of validations.jsonl, a line of the log and a picture of held-out
    images. One that a stop cut short is made when the run goes on.

    Args:
        method: of the run.
        settings: which images, how often.
        world: this process.

    Raises:
        ConfigError: images are too small for SSIM.
        DataError: there are no images.
    """

    def __init__(self, method: MaskingMethod, settings: ValidateConfig, world: World) -> None:
        config = method.config
        if min(config.image_size) < SMALLEST:
            raise ConfigError(
                f"validate.path: SSIM needs images of at least {SMALLEST} px, data.image_size is "
                f"{min(config.image_size)}"
            )
        self.method, self.config, self.settings = method, config, settings
        self.world, self.busy = world, False
        self.source = open_validation(config)
        self.batch_size = settings.batch_size or micro_batch(config, world.size)
        self.samples: FixedSamples | None = None
        if world.is_main and settings.pictures:
            pictured = replace(config, log=replace(config.log, pictures=settings.pictures))
            self.samples = FixedSamples(self.source, pictured, method.draw_mask)
        self.rows: list[dict[str, Any]] = []

    def begin(self, loop: "Loop") -> None:
        """Read what was validated before; validate what a stop left out."""
        step = loop.state.step
        if self.world.is_main and (loop.folder / VALIDATIONS_FILE).is_file():
            # rows beyond the checkpoint that the run goes on from: they will be made again
            self.rows = [r for r in loop.log.recorded(VALIDATIONS_FILE) if r["step"] <= step]
            kept = "".join(json.dumps(row) + "\n" for row in self.rows)
            files.write_text(loop.folder / VALIDATIONS_FILE, kept)
        done = any(row["step"] == step for row in self.rows)
        done = bool(broadcast_object(done, self.world))
        if step > 0 and not done and self._is_due(loop, last=step == loop.total):
            self._validate(loop)

    def observe(self, loop: "Loop", *, last: bool, stopping: bool) -> None:
        """Validate where it is due; a run that is asked to stop does so when it goes on."""
        if not stopping and self._is_due(loop, last):
            self._validate(loop)
            loop.restart_clock()

    def _is_due(self, loop: "Loop", last: bool) -> bool:
        step, batch = loop.state.step, self.config.train.batch_size
        images = len(loop.loader.source.names) * self.settings.every_epochs
        return last or int(step * batch / images) > int((step - 1) * batch / images)

    def _validate(self, loop: "Loop") -> None:
        model = _model(loop)
        self.busy = self.world.size == 1
        try:
            measured = validate(
                self.method,
                model,
                self.source,
                self.world,
                batch_size=self.batch_size,
                report=loop.log.warn,
            )
        finally:
            self.busy = False
        problem: object = self._record(loop, measured) if self.world.is_main else None
        problem = broadcast_object(problem, self.world)
        if problem:
            raise RunError(str(problem))

    def _record(self, loop: "Loop", measured: Measured) -> str | None:
        """Write the row, the line and the picture; returns what went wrong."""
        step = loop.state.step
        epoch = step * self.config.train.batch_size / len(loop.loader.source.names)
        values = {k: v if math.isfinite(v) else None for k, v in vars(measured).items()}
        row = {"step": step, "epoch": epoch, **values}  # JSON has no NaN
        try:
            loop.log.record(VALIDATIONS_FILE, row)
        except OSError as error:
            return f"{loop.folder / VALIDATIONS_FILE}: {error.strerror}"
        self.rows.append(row)
        loop.log.info(
            f"step {step}: validation loss {measured.loss:.4f}, PSNR {measured.psnr:.2f} dB, "
            f"SSIM {measured.ssim:.4f} on {measured.images:,} held-out images"
        )
        self._draw(loop)
        return None

    def _draw(self, loop: "Loop") -> None:
        if self.samples is None:
            return
        with precision.autocast(self.world.device, self.config.train.precision):
            picture = self.samples.draw(_model(loop))
        if picture is None:
            return
        path = loop.folder / PICTURES_FOLDER / f"step_{loop.state.step:08d}.png"
        try:
            save_picture(picture, path)
        except OSError as error:
            loop.log.warn(f"{path}: could not be written: {error.strerror}")
        loop.log.picture(np.asarray(picture), loop.state.step, "validation")

    def finish(self, loop: "Loop") -> None:
        """Say where the pictures are."""
        pictures = loop.folder / PICTURES_FOLDER
        if self.world.is_main and pictures.is_dir():
            loop.log.info(f"reconstructions of held-out images in {pictures}")


def pictures_and_validation(
    method: MaskingMethod, loader: Loader, world: World
) -> Sequence[Observer]:
    """What a method that masks does between its steps, as [log] and [validate] say.

    Raises:
        ConfigError: see `Validation`.
        DataError: there are no images to validate on.
    """
    config, found = method.config, list[Observer]()
    if world.is_main and config.log.picture_every_steps >= 0:
        samples = FixedSamples(loader.source, config, method.draw_mask)
        found.append(Pictures(config, world, samples.draw))
    if config.validate.path:
        found.append(Validation(method, config.validate, world))
    return found


def _model(loop: "Loop") -> MaskedImageModel:
    model = loop.state.averaged or loop.state.model
    assert isinstance(model, MaskedImageModel)
    return model
