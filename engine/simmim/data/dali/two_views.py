"""Two random crops of every image by NVIDIA DALI.

Each crop is a sample of its own to DALI, which decodes only what a crop needs: the crops are those
of `simmim.data.views.TwoViews`, with the rounding of `simmim.data.dali.pipeline`. As there, the
GPU's part was not run.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.producer import Filled
from simmim.data.views import VIEWS, crop_epoch


class DaliTwoViews:
    """Micro-batches of uint8 [B, 2, H, W, C]; a `simmim.data.producer.Producer`.

    Args:
        pipeline: for micro-batches of twice as many images.
    """

    def __init__(self, pipeline: DaliPipeline) -> None:
        self.pipeline = pipeline

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """See `Producer`; a sample whose one crop could not be made counts as unreadable."""
        with closing(self.pipeline.batches(_crops(places))) as crops:
            for filled in crops:
                problems = {slot // VIEWS: reason for slot, reason in filled.problems}
                image = filled.image
                yield Filled(image.view(-1, VIEWS, *image.shape[1:]), list(problems.items()))


def _crops(places: Iterable[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
    for batch in places:
        yield [
            (crop_epoch(epoch, view), sample) for epoch, sample in batch for view in range(VIEWS)
        ]
