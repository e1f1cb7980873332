"""What a method of pre-training supplies; the engine supplies everything else of a run.

B batch.
"""

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from simmim.backbone.build import Encoder, Spec
from simmim.config.idle import SET, Idle
from simmim.config.sections import Config, MethodConfig
from simmim.config.spec import resolve_spec
from simmim.data.augment import Augmentation
from simmim.data.batch import Batch
from simmim.data.source import Source
from simmim.data.views import CroppedView, View
from simmim.model.image_model import ImageModel
from simmim.pictures.reconstruction import FixedSamples
from simmim.training.observer import Draw
from simmim.training.optim import parameter_groups


class Method:
    """A method of pre-training; one file of this package defines one.

    A subclass sets its name, declares its [method] table, and defines at least `build` and `loss`.
    It keeps no state between steps: every random draw is a function of the seed, the epoch and the
    sample, so a resumed run ends like an unbroken one.

    Args:
        config: the run's configuration.

    Attributes:
        settings: the run's [method] table, of the type `Settings`.
        name: the value of `method.name` that chooses it; "" if it cannot be chosen.
        Settings: the type of its [method] table.
        Model: the type of what `build` returns; its `kind` is the method's name, and
            Model(encoder, mean=…, std=…, **model.settings) builds it again from a weights file.
        idle: settings that have no effect in its runs, in addition to those of every method.
        purpose: a few words on what it does, for lists.
        title: its common name.
        paper: address of its paper; "" if there is none.
    """

    name: ClassVar[str] = ""
    Settings: ClassVar[type[MethodConfig]] = MethodConfig
    Model: ClassVar[type[ImageModel]] = ImageModel
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("validate",), {"method.name": SET}, refused=True),
        Idle(("mask",), {"method.name": SET}),
    )
    purpose: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __init__(self, config: Config) -> None:
        self.config, given = config, config.method
        # a bare table only names the method, whose own keys then have their defaults
        self.settings = given if isinstance(given, self.Settings) else self.Settings()

    def check(self) -> None:
        """Raise ConfigError for what does not fit together, before any data is read."""

    def build(self, encoder: Encoder) -> ImageModel:
        """Build the module that trains, with `encoder` as its encoder; called after seeding."""
        raise NotImplementedError

    @cached_property  # every micro-batch asks for it
    def spec(self) -> Spec:
        """The encoder's architecture."""
        return resolve_spec(self.config)

    def arrange(self, image: Tensor) -> Tensor:
        """Rearrange the loader's images, [B, …, H, W, C], for the model: [B, …, C, H, W].

        The result has the memory format of the run's model.
        """
        image = image.movedim(-1, -3)
        if self.config.channels_last_on(image.device.type):
            return image
        return image.contiguous()

    def view(self) -> View:
        """What turns an image into an array: a random crop, uint8 [H, W, C], unless overridden."""
        data = self.config.data
        augmentation = Augmentation(
            self.config.image_size, data.crop_scale, data.crop_ratio, data.flip, data.channels
        )
        return CroppedView(
            augmentation,
            self.config.seed,
            max_pixels=data.max_pixels,
            value_range=data.value_range,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the images of a micro-batch; empty slots (id -1) carry no weight.

        Args:
            model: what `build` returned, or a wrapper of it (DistributedDataParallel,
                torch.compile).
            batch: the arrays that `view` made, [B, *shape], on the model's device.

        Returns:
            A scalar that gradients flow from.
        """
        raise NotImplementedError

    def parameter_groups(self, model: ImageModel) -> list[dict[str, Any]]:
        """Groups for the optimiser, each {"params", "names", "weight_decay"}.

        A group may carry "lr_scale", the factor of the scheduled rate, or "fixed_lr": True, which
        keeps the peak rate for the whole run.
        """
        optim = self.config.optim
        return parameter_groups(
            model, optim.weight_decay, decay_position_tables=optim.decay_position_tables
        )

    def measures(self, model: ImageModel) -> dict[str, Tensor]:
        """Scalars of the last step besides the loss; read only when a progress line is due."""
        return {}

    def warning(self, measures: dict[str, float]) -> str:
        """A line that says what is wrong with `measures` and what helps; "" if nothing is wrong."""
        return ""

    def picture(self, source: Source) -> Draw | None:
        """What draws the model, always with the same images of `source`; None draws nothing."""
        return None


class MaskingMethod(Method):
    """A method that hides part of an image; its model is a `MaskedImageModel`.

    It can be validated, and its pictures show reconstructions.
    """

    idle: ClassVar[tuple[Idle, ...]] = ()

    def draw_mask(self, ids: Tensor, epochs: Tensor) -> Tensor:
        """Draw the masks of samples, bool [B, gh, gw], True hides, from (seed, epoch, sample).

        Args:
            ids: int64 [B], ids of the samples; a negative id hides nothing.
            epochs: int64 [B], epochs of the samples.
        """
        raise NotImplementedError

    def picture(self, source: Source) -> Draw:
        """Reconstructions of the same images under the same masks."""
        return FixedSamples(source, self.config, self.draw_mask, self.config.log.pictures).draw
