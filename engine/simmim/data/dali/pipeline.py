"""NVIDIA DALI in the data path: it decodes, crops, resizes and flips JPEGs, on a GPU if it can.

Order, bytes, crops and flips are those of the CPU path: our sources are read by threads of this
process and DALI is handed encoded bytes, boxes and flips, so it has no state that a checkpoint
would have to keep. What it cannot decode, or decodes otherwise than the CPU path, is made by the
CPU path in the same threads; a batch that fails in DALI is made there too.

Everything here runs on the CPU and is tested there. On a GPU the same pipeline runs with
device="mixed"; that was not run, and says so where it matters.

B batch, C channels, H W pixels.
"""

import io
import math
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simmim.data.augment import Augmentation, augment, crop_box, is_flipped, resized, sample_key
from simmim.data.dali.backend import _import_dali, choose_backend
from simmim.data.dali.memory import (
    DEVICE_WORKSPACE,
    HOST_WORKSPACE,
    LARGEST_SHARE,
    RESIZED_AT_ONCE,
    SCHEDULED,
    largest_sub_batch,
)
from simmim.data.decode import (
    EXIF_ORIENTATION,
    MAX_PIXELS,
    Header,
    UnreadableImage,
    decode,
    read_header,
)
from simmim.data.producer import Filled
from simmim.data.source import Source, is_machine_fault
from simmim.errors import DataError

# An end marker further from the end is a truncated file, or a question for the CPU path.
TAIL_BYTES = 64
END_OF_IMAGE = b"\xff\xd9"

# DALI may differ from the CPU path by this much on a smooth picture, in levels, on average.
MAX_DIFFERENCE = 2.0

# Batches in a row that fail without naming an image: the machine is at fault.
MAX_FAILURES = 3

# How long a closing pass waits for reads that are under way.
CLOSE_S = 2.0

_FAILURES = (RuntimeError, MemoryError)  # what DALI raises


@dataclass(frozen=True)
class _Sample:
    """A sample that was read: bytes for DALI, or the view, or why there is neither."""

    epoch: int
    sample: int
    data: bytes = b""
    pixels: int = 0  # of the whole image
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False
    view: NDArray[np.uint8] | None = None
    problem: str = ""


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
        made_here: samples that DALI failed on although they can be read; the CPU path makes them.

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
        self.source, self.augmentation, self.seed = source, augmentation, seed
        self.device, self.micro_batch = device, micro_batch
        self.threads, self.prefetch = max(1, threads), max(1, prefetch)
        self.max_pixels, self.value_range = max_pixels, value_range
        self.timeout_s, self.report = timeout_s, report
        self.sub_batch_pixels = largest_sub_batch(
            memory_bytes, augmentation, micro_batch=micro_batch, threads=self.threads
        )
        self.largest_pixels = int(self.sub_batch_pixels * LARGEST_SHARE)
        self.made_here: set[int] = set()
        # orientations that DALI decodes as we do; found out before the first batch
        self._orientations: frozenset[int] = frozenset()

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """See `Producer`.

        Raises:
            DataError: DALI fails on batch after batch, or decodes other pixels than we do.
        """
        readers = _Readers(self.threads)
        try:
            with closing(_Decoder(self)) as decoder:
                self._orientations = self._compare(decoder)
                yield from _Pass(self, readers, decoder).run(places)
        finally:
            readers.close()

    def prepare(self, epoch: int, sample: int) -> _Sample:
        """Read a sample and decide who decodes it."""
        try:
            data = self.source.read(sample)
        except OSError as error:
            if is_machine_fault(error):
                raise
            return _Sample(epoch, sample, problem=error.strerror or repr(error))
        try:
            header = read_header(data)
        except UnreadableImage as error:
            return _Sample(epoch, sample, problem=str(error) if data else "the file is empty")
        if not self._suits_dali(data, header) or sample in self.made_here:
            return self.make_here(epoch, sample, data)
        key = sample_key(self.seed, epoch, sample)
        drawn = self.augmentation
        return _Sample(
            epoch,
            sample,
            data,
            header.width * header.height,
            crop_box(key, *header.upright_size, drawn.scale, drawn.ratio),
            is_flipped(key, drawn.flip),
        )

    def make_here(self, epoch: int, sample: int, data: bytes) -> _Sample:
        """A sample's view by the CPU path."""
        try:
            image = decode(
                data,
                self.augmentation.channels,
                max_pixels=self.max_pixels,
                value_range=self.value_range,
            )
        except UnreadableImage as error:
            return _Sample(epoch, sample, problem=str(error))
        key = sample_key(self.seed, epoch, sample)
        return _Sample(epoch, sample, view=augment(image, key, self.augmentation))

    def _suits_dali(self, data: bytes, header: Header) -> bool:
        return (
            header.plain
            and header.orientation in self._orientations
            and header.width * header.height <= min(self.largest_pixels, self.max_pixels)
            and len(data) <= self.largest_pixels
            # DALI may decode what there is of a truncated file
            and data.rfind(END_OF_IMAGE, len(data) - TAIL_BYTES) >= 0
        )

    def _compare(self, decoder: "_Decoder") -> frozenset[int]:
        """The EXIF orientations that DALI decodes as the CPU path does, by decoding a picture.

        Decoders of different GPUs are different programs, and a box that is cut before the turn
        would go unnoticed in training.
        """
        agreeing = set()
        for orientation in range(1, 9):
            data, box = _probe(orientation), (20, 30, 70, 50)
            probe = _Sample(0, 0, data, 1, box, True)
            found = torch.empty((1, *self.augmentation.size, self.augmentation.channels))
            decoder.schedule([probe])
            decoder.collect(found, [0])
            here = resized(
                decode(data, self.augmentation.channels), box, self.augmentation.size, flip=True
            )
            difference = float(np.abs(found[0].numpy() - here.astype(np.float32)).mean())
            if difference <= MAX_DIFFERENCE:
                agreeing.add(orientation)
            elif orientation == 1:
                raise DataError(
                    f"DALI's pixels differ from the CPU path's by {difference:.1f} levels on "
                    "average; use data.backend=cpu"
                )
        if len(agreeing) < 8:
            self.report("DALI turns images by EXIF otherwise than we do: they are decoded here")
        return frozenset(agreeing)


def _probe(orientation: int) -> bytes:
    """A smooth JPEG of 160 × 120 pixels without any symmetry."""
    down, right = np.mgrid[0:120, 0:160] / 160
    bands = [200 * right + 20, 200 * down + 30, 120 * right * down + 60]
    image = Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


class _Decoder:
    """DALI's pipeline: encoded bytes, boxes and flips → uint8 [n, H, W, C], in order."""

    def __init__(self, owner: DaliPipeline) -> None:
        self.owner = owner
        self.pipeline = self._build()

    def _build(self) -> Any:
        dali, owner = _import_dali()[0], self.owner
        fn, types = dali.fn, dali.types
        on_gpu = owner.device.type == "cuda"
        device_id = None
        if on_gpu:
            index = owner.device.index
            device_id = torch.cuda.current_device() if index is None else index
        pipeline = dali.Pipeline(
            batch_size=owner.micro_batch,
            num_threads=owner.threads,
            device_id=device_id,
            # a greater depth would start runs before their input is there; `schedule` looks ahead
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            box = fn.external_source(name="box", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            options: dict[str, Any] = {}
            if on_gpu:
                options = {
                    # threads bound to the first cores would meet those of other processes there
                    "affine": False,
                    "jpeg_fancy_upsampling": True,  # as libjpeg does
                    # taken at the start, so that a large image late in the run needs no more
                    "device_memory_padding": owner.largest_pixels * DEVICE_WORKSPACE,
                    "host_memory_padding": owner.largest_pixels * HOST_WORKSPACE,
                }
            images = fn.decoders.image_slice(
                encoded,
                box[0:2],
                box[2:4],
                device="mixed" if on_gpu else "cpu",
                axis_names="WH",
                output_type=types.GRAY if owner.augmentation.channels == 1 else types.RGB,
                **options,
            )
            images = fn.resize(
                images,
                size=owner.augmentation.size,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                minibatch_size=RESIZED_AT_ONCE,
            )
            pipeline.set_outputs(fn.flip(images, horizontal=flip))
        pipeline.build()
        return pipeline

    def schedule(self, samples: list[_Sample]) -> None:
        """Start on samples; returns at once."""
        feed = self.pipeline.feed_input
        feed("encoded", [np.frombuffer(sample.data, np.uint8) for sample in samples])
        feed("box", np.array([sample.box for sample in samples], np.int32))
        feed("flip", np.array([sample.flip for sample in samples], np.int32))
        self.pipeline.schedule_run()

    def collect(self, image: Tensor, slots: list[int]) -> None:
        """Wait for the oldest samples in work and copy their views to `slots` of `image`."""
        if image.is_cuda:
            # Not run on a GPU. Bound to torch's current stream, the outputs are waited for by that
            # stream and not by the host, the copy below is queued there behind them, and DALI takes
            # the memory back in that stream's order once `outputs` is dropped: neither side writes
            # to what the other still reads.
            stream = torch.cuda.current_stream(image.device)
            (outputs,) = self.pipeline.outputs(cuda_stream=stream)
        else:
            (outputs,) = self.pipeline.outputs()
        views = torch.utils.dlpack.from_dlpack(outputs.as_tensor())
        if slots[-1] - slots[0] + 1 == len(slots):
            image[slots[0] : slots[-1] + 1].copy_(views)
        else:
            image[torch.tensor(slots, device=image.device)] = views.to(image.dtype)

    def rebuild(self) -> None:
        """A new pipeline: DALI calls one that has failed no longer valid."""
        self.close()
        self.pipeline = self._build()

    def close(self) -> None:
        """Wait for what DALI is at, end its threads and free its memory."""
        self.pipeline = None


class _MicroBatch:
    """A micro-batch on its way: being read, then in sub-batches at DALI, then finished."""

    def __init__(self, reads: list["_Read"]) -> None:
        self.reads = reads
        self.samples: list[_Sample] | None = None  # once all are read
        self.waiting: deque[list[int]] = deque()  # slots of sub-batches that DALI has not yet
        self.unfinished = 0  # sub-batches
        self.image: Tensor | None = None

    def begin(self, samples: list[_Sample], pipeline: DaliPipeline) -> None:
        """Cut what is DALI's into sub-batches within the memory budget."""
        self.samples, self.reads = samples, []
        shape = (len(samples), *pipeline.augmentation.size, pipeline.augmentation.channels)
        self.image = torch.empty(shape, dtype=torch.uint8, device=pipeline.device)
        pixels = encoded = 0
        for slot, sample in enumerate(samples):
            if not sample.data:
                continue
            pixels, encoded = pixels + sample.pixels, encoded + len(sample.data)
            if not self.waiting or max(pixels, encoded) > pipeline.sub_batch_pixels:
                self.waiting.append([])
                pixels, encoded = sample.pixels, len(sample.data)
            self.waiting[-1].append(slot)
        self.unfinished = len(self.waiting)

    def finish(self) -> Filled:
        """The batch with what DALI has not made: our own views, and zeros."""
        assert self.samples is not None
        assert self.image is not None
        made_here = [slot for slot, sample in enumerate(self.samples) if not sample.data]
        if made_here:
            empty = np.zeros(self.image.shape[1:], np.uint8)
            views = [self.samples[slot].view for slot in made_here]
            stacked = torch.from_numpy(np.stack([empty if v is None else v for v in views]))
            slots = torch.tensor(made_here, device=self.image.device)
            self.image[slots] = stacked.to(self.image.device)
        problems = [(slot, s.problem) for slot, s in enumerate(self.samples) if s.problem]
        return Filled(self.image, problems)


class _Pass:
    """One pass over micro-batches."""

    def __init__(self, pipeline: DaliPipeline, readers: "_Readers", decoder: _Decoder) -> None:
        self.pipeline, self.readers, self.decoder = pipeline, readers, decoder
        self.begun: deque[_MicroBatch] = deque()
        self.scheduled: deque[tuple[_MicroBatch, list[int]]] = deque()
        self.failures = 0

    def run(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        """Micro-batches in order, `prefetch` of them ahead."""
        coming = iter(places)
        prepare = self.pipeline.prepare
        while True:
            while (
                len(self.begun) < self.pipeline.prefetch + 1
                and (batch := next(coming, None)) is not None
            ):
                reads = [self.readers.submit(prepare, *place) for place in batch]
                self.begun.append(_MicroBatch(reads))
            if not self.begun:
                return
            batch_now = self.begun[0]
            if batch_now.samples is None:
                batch_now.begin([self._answer(read) for read in batch_now.reads], self.pipeline)
            self._schedule()
            while batch_now.unfinished:
                self._collect()
                self._schedule()
            self.begun.popleft()
            yield batch_now.finish()

    def _answer(self, read: "_Read") -> _Sample:
        while True:
            try:
                return read.future.result(timeout=self.pipeline.timeout_s / 4)
            except TimeoutError:
                if read.future.done():  # just now, or with a TimeoutError of the source
                    return read.future.result()
                silent_s = time.monotonic() - (read.since or math.inf)
                if silent_s > self.pipeline.timeout_s:
                    epoch, sample = read.arguments[:2]
                    self.readers.hire()
                    self.pipeline.report(
                        f"a read gave no answer for {silent_s:.0f} s at "
                        f"{self.pipeline.source.names[sample]}; given up"
                    )
                    return _Sample(epoch, sample, problem=f"no answer for {silent_s:.0f} s")

    def _schedule(self) -> None:
        """Give DALI what has been read, in order, as far as it may look ahead."""
        for batch in self.begun:
            if batch.samples is None:
                if not all(read.is_answered() for read in batch.reads):
                    return  # or failed, which is told when its batch's turn has come
                batch.begin([read.future.result() for read in batch.reads], self.pipeline)
            assert batch.samples is not None
            while batch.waiting:
                if len(self.scheduled) >= SCHEDULED:
                    return
                slots = batch.waiting[0]
                try:
                    self.decoder.schedule([batch.samples[slot] for slot in slots])
                except _FAILURES as error:
                    if not self.scheduled:
                        batch.waiting.popleft()
                        self._make_here(batch, slots, error)
                    return  # otherwise the oldest in work fails as well, and is dealt with first
                batch.waiting.popleft()
                self.scheduled.append((batch, slots))

    def _collect(self) -> None:
        if not self.scheduled:
            return
        batch, slots = self.scheduled.popleft()
        assert batch.image is not None
        try:
            self.decoder.collect(batch.image, slots)
        except _FAILURES as error:
            self._make_here(batch, slots, error)
            return
        batch.unfinished -= 1
        self.failures = 0

    def _make_here(self, batch: _MicroBatch, slots: list[int], error: Exception) -> None:
        """A sub-batch that DALI failed on, by the CPU path; DALI starts anew with the others."""
        assert batch.samples is not None
        for other, others in reversed(self.scheduled):
            other.waiting.appendleft(others)
        self.scheduled.clear()
        samples, pipeline = batch.samples, self.pipeline
        reason = _reason(error)
        named = re.search(r"sample #(\d+)", reason)
        if named:
            offender = samples[slots[int(named[1])]].sample
            pipeline.made_here.add(offender)
            pipeline.report(
                f"DALI cannot decode {pipeline.source.names[offender]} ({reason}); its batch was "
                "decoded here, and it will be"
            )
        else:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                raise DataError(
                    f"DALI fails on batch after batch ({reason}); try fewer data.dali_memory_mib, "
                    "or data.backend=cpu; the same command resumes from the last checkpoint"
                )
            pipeline.report(f"DALI failed on a batch ({reason}); it was decoded here")
        self.decoder.rebuild()
        redone = [
            self.readers.submit(pipeline.make_here, s.epoch, s.sample, s.data)
            for s in (samples[slot] for slot in slots)
        ]
        for slot, read in zip(slots, redone):
            samples[slot] = self._answer(read)
        batch.unfinished -= 1


def _reason(error: Exception) -> str:
    """The lines of DALI's report that say what happened, in one."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [
        line for line in lines if re.search(r"sample #\d|failure|[Ff]ailed|rror code|emory", line)
    ]
    return (said or [line for line in lines if line] or [type(error).__name__])[-1].rstrip(" :")


class _Read:
    """A task of a reading thread and, in time, its answer."""

    def __init__(self, function: Callable[..., _Sample], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.future: Future[_Sample] = Future()
        self.since: float | None = None  # monotonic clock; when a thread took it

    def is_answered(self) -> bool:
        return self.future.done() and self.future.exception() is None


class _Readers:
    """Threads that read and prepare samples; no interpreter's exit waits for one that hangs."""

    def __init__(self, threads: int) -> None:
        self.tasks: SimpleQueue[_Read | None] = SimpleQueue()
        self.closed = False
        self.threads: list[Thread] = []
        for _ in range(threads):
            self.hire()

    def hire(self) -> None:
        """One more thread."""
        thread = Thread(target=self._work, daemon=True, name=f"simmim-read-{len(self.threads)}")
        thread.start()
        self.threads.append(thread)

    def submit(self, function: Callable[..., _Sample], *arguments: Any) -> _Read:
        """Call `function` in one of the threads."""
        read = _Read(function, arguments)
        self.tasks.put(read)
        return read

    def _work(self) -> None:
        while (read := self.tasks.get()) is not None and not self.closed:
            read.since = time.monotonic()
            try:
                read.future.set_result(read.function(*read.arguments))
            except BaseException as error:
                read.future.set_exception(error)

    def close(self) -> None:
        """End the threads; one that hangs in a read ends when the read does."""
        self.closed = True
        for _ in self.threads:
            self.tasks.put(None)
        until = time.monotonic() + CLOSE_S
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
