"""Random images for the rows of bench/throughput.py.

B batch, C channels, H W pixels, h w mask grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmim.config.sections import Config
from simmim.data.batch import Batch
from simmim.method.build import find_method
from simmim.method.simsiam import SimSiamMethod
from simmim.model.image_model import ImageModel, MaskedImageModel


@dataclass(frozen=True)
class Images:
    """The same images in the two forms that rows take.

    Attributes:
        batch: as the engine's loader returns it: uint8 [B, *shape of the method's view], and ids.
        ready: what a model is called with if everything is prepared before: normalised images,
            float32 [B, C, H, W], and the mask, bool [B, h, w]; for SimSiam two normalised views.
    """

    batch: Batch
    ready: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, count: int, model: ImageModel, config: Config) -> "Images":
        """Random images on the model's device, with the masks or views that the engine draws."""
        device, method = model.mean.device, find_method(config)
        shape = (count, *method.view().shape)
        generator = torch.Generator().manual_seed(count)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if isinstance(method, SimSiamMethod):
            image = _tint(image, generator)
        image = image.to(device)
        ids = torch.arange(count, device=device)
        batch = Batch(image, ids, torch.zeros_like(ids), count)
        if isinstance(method, SimSiamMethod):
            first, second = method.distorted(image, batch.ids, batch.epochs)
            return cls(batch, (model.normalise(first), model.normalise(second)))
        assert isinstance(model, MaskedImageModel)
        masked_method: Any = method
        mask = model.token_mask(masked_method.draw_mask(batch.ids, batch.epochs))
        return cls(batch, (model.normalise(image.permute(0, 3, 1, 2)).contiguous(), mask))


def _tint(image: Tensor, generator: torch.Generator) -> Tensor:
    """Give every image, uint8 [B, 2, H, W, C], its own colour and contrast.

    A network sees no difference between images of plain noise. Batch norms over features that are
    all the same would leave only rounding errors to compare.
    """
    channels = image.shape[-1]
    colour = torch.rand(len(image), 1, 1, 1, channels, generator=generator)
    contrast = torch.rand(len(image), 1, 1, 1, 1, generator=generator)
    return (image * contrast + 255 * colour * (1 - contrast)).to(torch.uint8)
