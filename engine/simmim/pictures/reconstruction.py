"""Pictures of what the model sees and predicts: original | masked | reconstruction."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simmim.config.sections import Config
from simmim.data.augment import centre_view
from simmim.data.decode import UnreadableImage, decode
from simmim.data.source import Source
from simmim.model.image_model import ImageModel, MaskedImageModel, evaluation_mode
from simmim.model.masking import sample_mask
from simmim.pictures.grid import titled_grid
from simmim.pictures.samples import pictured_images

COLUMNS = ("original", "masked", "reconstruction")
HIDDEN_GREY = 128


@torch.no_grad()
def reconstruction_panels(
    model: MaskedImageModel, image: Tensor, mask: Tensor
) -> NDArray[np.uint8]:
    """Original, masked and reconstructed images.

    The reconstruction shows the prediction where pixels were hidden, and the original elsewhere
    (the loss never asked for the visible part).

    Args:
        model: the model, which is in evaluation mode during the call.
        image: uint8 [B, C, H, W], on the model's device.
        mask: bool [B, gh, gw], True hides.

    Returns:
        uint8 [B, 3, H, W, C]; axis 1 is `COLUMNS`.
    """
    with evaluation_mode(model):
        prediction = model.denormalise(model.predicted_pixels(image, mask))
    hidden = model.pixel_mask(mask)
    masked = torch.where(hidden, HIDDEN_GREY, image)
    panels = torch.stack([image, masked, torch.where(hidden, prediction, image)], 1)
    return panels.permute(0, 1, 3, 4, 2).cpu().numpy()


def draw_grid(panels: NDArray[np.uint8], captions: list[str] | None = None) -> Image.Image:
    """Join panels [B, 3, H, W, C] of `reconstruction_panels`; captions stand in the left column."""
    below = [[caption, "", ""] for caption in captions or ()]
    return titled_grid(panels, COLUMNS, below)


def _draw_masks(
    model: MaskedImageModel, ids: list[int], unit: int, ratio: float, seed: int
) -> Tensor:
    """The masks that samples have in epoch 0, on the model's device."""
    spec, device = model.encoder.spec, model.mean.device
    return sample_mask(
        torch.tensor(ids, device=device),
        torch.zeros(len(ids), dtype=torch.int64, device=device),
        spec.grid,
        patch_size=spec.patch_size,
        mask_unit=unit,
        ratio=ratio,
        seed=seed,
    )


def reconstruct_files(
    model: MaskedImageModel,
    files: list[Path],
    *,
    mask_unit: int,
    ratio: float,
    seed: int,
    value_range: tuple[float, float] | None = None,
) -> Image.Image:
    """Reconstruct photos: the largest central crop of each, masked at random.

    Args:
        model: the model, which runs on the device where it is.
        files: image files.
        mask_unit: side of a mask unit, in pixels.
        ratio: share of units that is hidden.
        seed: seed of the masks; image i of the list gets the mask of sample i.
        value_range: see `simmim.data.decode.decode`.

    Raises:
        ValueError: the mask does not fit the model, or a file is no image; the message names it.
    """
    spec = model.encoder.spec
    if mask_unit % spec.patch_size or any(side % mask_unit for side in spec.image_size):
        raise ValueError(
            f"a mask unit of {mask_unit} px must be a multiple of the patch size {spec.patch_size} "
            f"px and divide the image, {spec.image_size[0]}×{spec.image_size[1]} px"
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"a mask ratio of {ratio} must be above 0 and at most 1")
    views = []
    for file in files:
        try:
            pixels = decode(file.read_bytes(), spec.channels, value_range=value_range)
            views.append(centre_view(pixels, spec.image_size))
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
        except UnreadableImage as error:
            raise ValueError(f"{file}: not a readable image ({error})") from None
    device = model.mean.device
    panels = []
    for number, view in enumerate(views):  # one at a time: any number of photos fits in memory
        image = torch.from_numpy(view)[None].permute(0, 3, 1, 2).to(device)
        mask = _draw_masks(model, [number], mask_unit, ratio, seed)
        panels.append(reconstruction_panels(model, image, mask))
    return draw_grid(np.concatenate(panels), [file.name for file in files])


class FixedSamples:
    """Draws the same images under the same masks, to show the progress of a run.

    Args:
        source: the run's images; unreadable ones are skipped.
        config: the run's configuration, whose seed picks the images.
        draw_mask: (ids, epochs) → the masks of samples, bool [B, gh, gw].
        count: number of images.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        draw_mask: Callable[[Tensor, Tensor], Tensor],
        count: int,
    ) -> None:
        self.draw_mask = draw_mask
        images = list(pictured_images(source, config, count, tries=4 * count))
        self.ids = [image.sample for image in images]
        self.views = [image.centre for image in images]

    def draw(self, model: ImageModel) -> Image.Image | None:
        """Draw the model in its present state; None if no image could be read."""
        assert isinstance(model, MaskedImageModel)
        if not self.ids:
            return None
        device = model.mean.device
        image = torch.from_numpy(np.stack(self.views)).permute(0, 3, 1, 2).contiguous().to(device)
        ids = torch.tensor(self.ids, device=device)
        mask = self.draw_mask(ids, torch.zeros_like(ids))
        return draw_grid(reconstruction_panels(model, image, mask))
