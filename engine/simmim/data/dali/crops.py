"""The crops of a view by NVIDIA DALI, which makes one crop a sample.

Each crop is a sample of its own to DALI, which decodes only what a crop needs: the crops are those
of the CPU path, with the rounding of `simmim.data.dali.pipeline`. As there, the GPU's part was not
run.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.producer import Filled
from simmim.data.views import RandomCrops


class DaliCrops:
    """Micro-batches of uint8 [B, N, H, W, C], N crops a sample; a `simmim.data.producer.Producer`.

    Args:
        pipeline: for micro-batches of N times as many images.
        crops: says N, and which crops they are.
    """

    def __init__(self, pipeline: DaliPipeline, crops: RandomCrops) -> None:
        self.pipeline, self.crops = pipeline, crops

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """See `Producer`; a sample of which one crop could not be made counts as unreadable."""
        count = self.crops.per_sample
        with closing(self.pipeline.batches(self._single_crops(places))) as filled:
            for crops in filled:
                problems = {slot // count: reason for slot, reason in crops.problems}
                image = crops.image
                yield Filled(image.view(-1, count, *image.shape[1:]), list(problems.items()))

    def _single_crops(
        self, places: Iterable[list[tuple[int, int]]]
    ) -> Iterator[list[tuple[int, int]]]:
        for batch in places:
            yield [
                (self.crops.epoch_of(epoch, number), sample)
                for epoch, sample in batch
                for number in range(self.crops.per_sample)
            ]
