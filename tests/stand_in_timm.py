"""Stands in for timm and torchvision, which are not installed everywhere: keeps what it is given.

Its classes and functions take the arguments of the real ones that the engine gives, by name, so
that a value that arrives at another name, or not at all, is seen. What they compute is simple and
follows the same generators: those of Python, NumPy and torch.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def drawn() -> tuple[float, float, float]:
    """A number of each generator that timm draws from."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Mixup:
    """timm.data.Mixup: the mean of each image and its partner, brighter by what is drawn."""

    made: "list[Mixup]"

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float,
        switch_prob: float,
        mode: str,
        label_smoothing: float,
        num_classes: int,
    ) -> None:
        self.options = {
            "mixup_alpha": mixup_alpha,
            "cutmix_alpha": cutmix_alpha,
            "prob": prob,
            "switch_prob": switch_prob,
            "mode": mode,
            "label_smoothing": label_smoothing,
            "num_classes": num_classes,
        }
        self.made.append(self)

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        image = (image + image.flip(0)) / 2 + sum(drawn())
        one_hot = torch.nn.functional.one_hot(label, self.options["num_classes"]).float()
        return image, (one_hot + one_hot.flip(0)) / 2


class Operation:
    """An operation of a policy of timm."""

    def __init__(self, name: str, aug_fn: Callable[..., Image.Image]) -> None:
        self.name, self.aug_fn = name, aug_fn

    def __call__(self, image: Image.Image) -> Image.Image:
        return image


class RandomCrop:
    """torchvision.transforms.RandomCrop: cuts from the corner, so that no draw is needed."""

    def __init__(self, size: tuple[int, int], *, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.crop((0, 0, self.size[1], self.size[0]))


class Transform:
    """What timm.data.create_transform gives: the image at the wanted size, plus what is drawn."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        height, width = options["input_size"]
        policy = SimpleNamespace(
            ops=[Operation("Rotate", rotated), Operation("PosterizeIncreasing", posterised)]
        )
        self.transforms: list[Any] = [
            lambda image: image.resize((width, height)),
            SimpleNamespace(policy=[[policy]]),
        ]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(self.transforms[0](image), dtype=np.float32)
        pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        return torch.from_numpy(pixels.copy()) + sum(drawn())


def rotated(image: Image.Image, degrees: float) -> Image.Image:
    """An operation that the engine has no reason to change."""
    return image.rotate(degrees)


def posterised(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """As Pillow, which refuses 0 bits."""
    if bits == 0:
        raise ValueError("0 bits")
    return image.point(lambda value: value & -(1 << 8 - bits))


class StandIns:
    """What `import_timm` gives, and what was made by it.

    Attributes:
        transforms: of create_transform, in order.
        mixups: in order.
    """

    def __init__(self) -> None:
        self.transforms: list[Transform] = []
        self.mixups: list[Mixup] = []

    def import_timm(self, module: str) -> Any:
        """The modules that the engine asks for."""
        mixup = type("Mixup", (Mixup,), {"made": self.mixups})
        return {
            "timm.data": SimpleNamespace(Mixup=mixup, create_transform=self._create_transform),
            "torchvision.transforms": SimpleNamespace(RandomCrop=RandomCrop),
        }[module]

    def _create_transform(self, **options: Any) -> Transform:
        self.transforms.append(Transform(**options))
        return self.transforms[-1]
