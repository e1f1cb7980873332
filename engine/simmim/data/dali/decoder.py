"""NVIDIA DALI's own pipeline of operators, its input and its output.

On a GPU the same pipeline runs with device="mixed"; that was not run, and says so where it matters.
"""

import re
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from simmim.data.augment import Augmentation
from simmim.data.dali.backend import import_dali
from simmim.data.dali.memory import DEVICE_WORKSPACE, HOST_WORKSPACE, RESIZED_AT_ONCE
from simmim.data.dali.samples import PreparedSample

FAILURES = (RuntimeError, MemoryError)  # what DALI raises


class Decoder:
    """DALI's pipeline: encoded bytes, boxes and flips → uint8 [n, H, W, C], in order.

    Args:
        augmentation: size and channels of the views.
        device: a CUDA device decodes there.
        micro_batch: images given at a time, at most.
        threads: that decode.
        largest_pixels: of one image, at most.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        device: torch.device,
        *,
        micro_batch: int,
        threads: int,
        largest_pixels: int,
    ) -> None:
        self.augmentation, self.device = augmentation, device
        self.micro_batch, self.threads = micro_batch, threads
        self.largest_pixels = largest_pixels
        self.pipeline = self._build()

    def _build(self) -> Any:
        dali = import_dali()[0]
        fn, types = dali.fn, dali.types
        on_gpu = self.device.type == "cuda"
        device_id = None
        if on_gpu:
            index = self.device.index
            device_id = torch.cuda.current_device() if index is None else index
        pipeline = dali.Pipeline(
            batch_size=self.micro_batch,
            num_threads=self.threads,
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
                    "device_memory_padding": self.largest_pixels * DEVICE_WORKSPACE,
                    "host_memory_padding": self.largest_pixels * HOST_WORKSPACE,
                }
            images = fn.decoders.image_slice(
                encoded,
                box[0:2],
                box[2:4],
                device="mixed" if on_gpu else "cpu",
                axis_names="WH",
                output_type=types.GRAY if self.augmentation.channels == 1 else types.RGB,
                **options,
            )
            images = fn.resize(
                images,
                size=self.augmentation.size,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                minibatch_size=RESIZED_AT_ONCE,
            )
            pipeline.set_outputs(fn.flip(images, horizontal=flip))
        pipeline.build()
        return pipeline

    def schedule(self, samples: list[PreparedSample]) -> None:
        """Give DALI samples to work on; returns at once."""
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


def reason_of(error: Exception) -> str:
    """The last line of DALI's report that says what happened."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [
        line for line in lines if re.search(r"sample #\d|failure|[Ff]ailed|rror code|emory", line)
    ]
    return (said or [line for line in lines if line] or [type(error).__name__])[-1].rstrip(" :")
