"""Which images of a run its pictures show: always the same, picked by the seed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmim.config.sections import Config
from simmim.data.decode import UnreadableImage
from simmim.data.source import Source
from simmim.data.views import CentreView
from simmim_kernels.splitmix import fold, permutation


@dataclass(frozen=True)
class PicturedImage:
    """An image that pictures show.

    Attributes:
        sample: its number in the source.
        data: its encoded bytes.
        centre: its largest central crop at the run's size, uint8 [H, W, C].
    """

    sample: int
    data: bytes
    centre: NDArray[np.uint8]


def pictured_images(
    source: Source, config: Config, count: int, *, tries: int
) -> Iterator[PicturedImage]:
    """The first `count` readable images of a source in an order that the run's seed draws.

    Args:
        source: the images.
        config: the run's configuration.
        count: how many images to give, if so many can be read.
        tries: how many images to try at most.
    """
    view = CentreView(config)
    for sample in permutation(fold(config.seed), len(source.names))[:tries].tolist():
        if count == 0:
            return
        try:
            data, centre = source.read(sample), np.empty(view.shape, np.uint8)
            view.fill(centre, data, 0, sample)
        except (UnreadableImage, OSError):
            continue
        count -= 1
        yield PicturedImage(sample, data, centre)
