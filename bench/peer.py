"""What a row of another package is made of: a model, and where our weights belong in it.

B batch, C channels, H W pixels, h w mask grid, D width, p patch size.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.build import Spec

Weights = Mapping[str, Tensor]


class Unavailable(Exception):
    """This peer has no row here; one line that says why."""


class Mismatch(Exception):
    """Two sides do not compute the same thing; one line that says where and by how much."""


@dataclass(frozen=True)
class Pair:
    """A parameter of a peer, and what it is of ours; gradients correspond in the same way.

    Attributes:
        theirs: its name in the peer.
        take: our parameters (or their gradients) by name → the peer's.
        compared: False where the gradient is rounding noise (a key's bias cancels in the softmax)
            or is not there (frozen).
    """

    theirs: str
    take: Callable[[Weights], Tensor]
    compared: bool = True


@dataclass(frozen=True)
class Peer:
    """A model that computes what ours does.

    Attributes:
        name: of its row.
        spec: the architecture of ours that it equals.
        model: (image, mask in the peer's form) → scalar loss, or (view, other view) → scalar loss.
        pairs: one for each of its parameters.
        mask_form: mask, bool [B, h, w] → the form that the model takes; views stay as they are.
        note: what a reader of its row must know.
        formats: memory formats that its users choose among; the row takes the fastest.
    """

    name: str
    spec: Spec
    model: nn.Module
    pairs: list[Pair]
    mask_form: Callable[[Tensor], Tensor] = lambda mask: mask
    note: str = ""
    formats: tuple[torch.memory_format, ...] = (torch.contiguous_format,)

    def load(self, weights: Weights) -> None:
        """Copy our parameters into the peer.

        Raises:
            Mismatch: the peer's parameters are not those that its file knows.
        """
        parameters = dict(self.model.named_parameters())
        assert parameters.keys() == {pair.theirs for pair in self.pairs}
        for pair in self.pairs:
            target = parameters[pair.theirs]
            try:
                value = pair.take(weights)
            except KeyError as error:
                raise Mismatch(f"{self.name}: {pair.theirs}: ours has no {error}") from None
            if value.shape != target.shape:
                shapes = f"{list(target.shape)}, ours {list(value.shape)}"
                raise Mismatch(f"{self.name}: {pair.theirs} is {shapes}")
            with torch.no_grad():
                target.copy_(value)


def take(name: str) -> Callable[[Weights], Tensor]:
    """Our parameter of that name, as it is."""
    return lambda weights: weights[name]


def published_loss(prediction: Tensor, image: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over hidden pixels, image-sized as published.

    Args:
        prediction: [B, C, H, W].
        image: [B, C, H, W], normalised.
        mask: bool [B, h, w].
        patch_size: in pixels.

    Source: microsoft/SimMIM models/simmim.py.
    """
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    pixels = pixels.unsqueeze(1).contiguous()  # [B, 1, H, W]
    error = F.l1_loss(image, prediction, reduction="none")
    return (error * pixels).sum() / (pixels.sum() + 1e-5) / image.shape[1]


def published_head(spec: Spec, width: int) -> nn.Sequential:
    """1×1 convolution and pixel shuffle, [B, D, h, w] → [B, C, H, W]."""
    return nn.Sequential(
        nn.Conv2d(width, spec.channels * spec.stride**2, 1), nn.PixelShuffle(spec.stride)
    )


def blend(tokens: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """The mask token in place of hidden tokens [B, …, D], as published; mask bool [B, …]."""
    weight = mask.unsqueeze(-1).type_as(mask_token)
    return tokens * (1.0 - weight) + mask_token * weight


def import_package(name: str) -> ModuleType:
    """A package's module.

    Raises:
        Unavailable: it is not installed, or does not import here.
    """
    package = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise Unavailable(f"{package} is not installed: pip install {package}") from None
        reason = str(error)
    except (ImportError, RuntimeError) as error:
        reason = str(error)  # such as a torchvision that was built for another torch
    raise Unavailable(f"{package} does not import here: {reason.splitlines()[0]}")
