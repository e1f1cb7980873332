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
from simmim.data.augment import centre_view
from simmim.data.decode import UnreadableImage, decode
from simmim.data.source import Source
from simmim.data.views import View
from simmim.model.image_model import ImageModel, evaluation_mode
from simmim.pictures.grid import titled_grid
from simmim_kernels.splitmix import fold, permutation

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
        self.ids: list[int] = []
        self.whole: list[NDArray[np.uint8]] = []
        self.views: list[NDArray[np.uint8]] = []
        wanted = self.drawn + POOL
        for sample in permutation(fold(config.seed), len(source.names))[: 2 * wanted].tolist():
            if len(self.ids) == wanted:
                break
            try:
                data = source.read(sample)
                image = decode(
                    data,
                    config.data.channels,
                    max_pixels=config.data.max_pixels,
                    value_range=config.data.value_range,
                )
            except (UnreadableImage, OSError):
                continue
            if len(self.ids) < self.drawn:
                views = np.empty(view.shape, np.uint8)
                view.fill(views, data, 0, sample)
                self.views.append(views)
            self.ids.append(sample)
            self.whole.append(centre_view(image, config.image_size))

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
