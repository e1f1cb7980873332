"""Pictures of what SimSiam-like methods compare: an image, its views, and the images nearest to it.

B images, V views, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simmim.config.sections import Config
from simmim.data.source import Source
from simmim.data.views import View
from simmim.model.image_model import ImageModel, evaluation_mode
from simmim.pictures.grid import titled_grid
from simmim.pictures.samples import pictured_images

# Number of images among which neighbours are searched, and number of neighbours shown.
POOL, NEIGHBOURS = 60, 2

# Images that are encoded at once.
ENCODED = 8


class ViewPictures:
    """Draws the same images and views again and again, to show what a run compares and learns.

    The views are those of epoch 0. The neighbours of an image are those whose mean features have
    the highest cosine with its own, among the largest central crops of a few dozen images.

    Args:
        source: the run's images; unreadable ones are skipped.
        config: the run's configuration, whose seed picks the images.
        view: makes uint8 [V, H, W, C] from an image.
        distort: (uint8 [B, V, H, W, C], ids, epochs) → V tensors uint8 [B, C, H, W], as the model
            takes them.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        view: View,
        distort: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]],
    ) -> None:
        self.distort, self.drawn = distort, config.log.pictures
        wanted = self.drawn + POOL
        images = list(pictured_images(source, config, wanted, tries=2 * wanted))
        self.ids = [image.sample for image in images]
        self.whole = [image.centre for image in images]
        self.views: list[NDArray[np.uint8]] = []
        for image in images[: self.drawn]:
            self.views.append(np.empty(view.shape, np.uint8))
            view.fill(self.views[-1], image.data, 0, image.sample)

    def draw(self, model: ImageModel) -> Image.Image | None:
        """Draw the model in its present state; None if no image could be read."""
        if not self.ids:
            return None
        device = model.mean.device
        views = torch.from_numpy(np.stack(self.views)).to(device)
        ids = torch.tensor(self.ids[: len(views)], device=device)
        distorted = self.distort(views, ids, torch.zeros_like(ids))
        columns = [np.stack(self.whole[: len(views)])]
        columns += [pixels.permute(0, 2, 3, 1).cpu().numpy() for pixels in distorted]
        titles = ["image", *(f"view {number + 1}" for number in range(len(distorted)))]
        near, cosines = self._neighbours(model)
        columns += [np.stack([self.whole[i] for i in column]) for column in near.T]
        titles += ["nearest", "next"][: near.shape[1]]
        empty = [""] * (1 + len(distorted))
        captions = [[*empty, *(f"cosine {cosine:.2f}" for cosine in row)] for row in cosines]
        return titled_grid(np.stack(columns, axis=1), titles, captions)

    @torch.no_grad()
    def _neighbours(self, model: ImageModel) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """For every drawn image, the indices [B, K] of the nearest others, and their cosines."""
        features = []
        with evaluation_mode(model):
            for start in range(0, len(self.whole), ENCODED):
                some = torch.from_numpy(np.stack(self.whole[start : start + ENCODED]))
                image = some.permute(0, 3, 1, 2).contiguous().to(model.mean.device)
                features.append(model.encode(image).float().mean((2, 3)))
        directions = F.normalize(torch.cat(features))
        cosines = directions[: len(self.views)] @ directions.T
        cosines.fill_diagonal_(-2.0)  # an image is no neighbour of itself
        nearest = cosines.topk(min(NEIGHBOURS, len(self.whole) - 1), dim=1)
        return nearest.indices.cpu().numpy(), nearest.values.cpu().numpy()
