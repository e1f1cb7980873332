"""NVIDIA DALI in the data path: it decodes, crops, resizes and flips JPEGs, on a GPU if it can.

Order, bytes, crops and flips are those of the CPU path: our sources are read by threads of this
process and DALI is handed encoded bytes, boxes and flips, so it has no state that a checkpoint
would have to keep. What it cannot decode, or decodes otherwise than the CPU path, is made by the
CPU path in the same threads; a batch that fails in DALI is made there too.

Everything here runs on the CPU and is tested there. On a GPU the same pipeline runs with
device="mixed"; that was not run, and says so where it matters.

B batch, C channels, H W pixels.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing

import torch

from simmim.data.augment import Augmentation
from simmim.data.dali.backend import choose_backend
from simmim.data.dali.batches import Pass
from simmim.data.dali.comparison import agreeing_orientations
from simmim.data.dali.decoder import FAILURES, Decoder, reason_of
from simmim.data.dali.memory import LARGEST_SHARE, largest_sub_batch
from simmim.data.dali.readers import Readers
from simmim.data.dali.samples import Preparation, PreparedSample
from simmim.data.decode import MAX_PIXELS
from simmim.data.producer import Filled
from simmim.data.source import Source
from simmim.data.views import RandomCrops
from simmim.errors import DataError


class DaliPipeline:
    """Fills micro-batches with DALI; a `simmim.data.producer.Producer`.

    The pixels differ from the CPU path's by rounding (0.15 levels on average on ImageNet's photos,
    on the CPU). A damaged JPEG whose decoder can go on is decoded, where the CPU path may refuse
    it.

    Args:
        source: images; read by several threads at once.
        augmentation: what is drawn per sample; 1 or 3 channels.
        seed: the run's seed.
        device: where the batches are wanted; a CUDA device decodes there.
        micro_batch: samples of a micro-batch, at most.
        threads: that read and prepare, and as many of DALI's that decode.
        prefetch: micro-batches that are read ahead of the one asked for.
        memory_bytes: that DALI may take; see `estimate_bytes`.
        max_pixels: a larger image is refused.
        value_range: see `simmim.data.decode.decode`.
        timeout_s: after which a read that gives no answer is given up.
        report: told, in a line, what DALI could not do.

    Attributes:
        preparation: of the samples; it remembers, from one pass to the next, what DALI failed on.

    Raises:
        DataError: no DALI, other channels, or too little memory.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        seed: int,
        *,
        device: torch.device,
        micro_batch: int,
        threads: int,
        prefetch: int,
        memory_bytes: int,
        max_pixels: int = MAX_PIXELS,
        value_range: tuple[float, float] | None = None,
        timeout_s: float = 300.0,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        choose_backend("dali", device, augmentation.channels)
        self.device, self.augmentation, self.micro_batch = device, augmentation, micro_batch
        self.threads, self.prefetch = max(1, threads), max(1, prefetch)
        self.timeout_s, self.report = timeout_s, report
        self.sub_batch_pixels = largest_sub_batch(
            memory_bytes, augmentation, micro_batch=micro_batch, threads=self.threads
        )
        self.largest_pixels = int(self.sub_batch_pixels * LARGEST_SHARE)
        crops = RandomCrops(augmentation, seed, max_pixels, value_range)
        self.preparation = Preparation(source, crops, self.largest_pixels)
        self._built: Decoder | None = None

    def build(self) -> None:
        """Have DALI build what the first batches need.

        Raises:
            DataError: it cannot, such as with a driver that is too old for it.
        """
        self._built = self._decoder()

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """See `Producer`.

        Raises:
            DataError: DALI fails on batch after batch, or decodes other pixels than we do.
        """
        readers: Readers[PreparedSample] = Readers(self.threads)
        try:
            with closing(self._decoder()) as decoder:
                self.preparation.orientations = agreeing_orientations(decoder, self.report)
                batches = Pass(
                    self.preparation,
                    readers,
                    decoder,
                    sub_batch_pixels=self.sub_batch_pixels,
                    prefetch=self.prefetch,
                    timeout_s=self.timeout_s,
                    report=self.report,
                )
                yield from batches.run(places)
        finally:
            readers.close()

    def _decoder(self) -> Decoder:
        if self._built is not None:
            decoder, self._built = self._built, None
            return decoder
        try:
            return Decoder(
                self.augmentation,
                self.device,
                micro_batch=self.micro_batch,
                threads=self.threads,
                largest_pixels=self.largest_pixels,
            )
        except FAILURES as error:
            why = reason_of(error)
            raise DataError(f"DALI cannot build its pipeline on {self.device}: {why}") from error
