"""An estimate, made before a run, of the memory that a pipeline of DALI takes."""

import math

from simmim.data.augment import Augmentation
from simmim.errors import DataError

# Sub-batches that DALI works on: one is decoded while the one before is resized.
SCHEDULED = 2

# Of a sub-batch's pixels, the share that one image may have; larger ones are decoded by us.
LARGEST_SHARE = 1 / 4

# The smallest sub-batch in pixels: images of one megapixel go to DALI under every budget.
MIN_PIXELS = 2**22

# The largest sub-batch in pixels, whatever the budget.
MAX_SUB_BATCH_PIXELS = 2**31

# Bytes a pixel that a decoding thread needs: the coefficients of a progressive JPEG (three
# channels, 16 bits), on the device and, in two halves, page-locked on the host.
DEVICE_WORKSPACE, HOST_WORKSPACE = 6, 3

# DALI resizes this many images in one kernel call (`minibatch_size`).
RESIZED_AT_ONCE = 32

# Allocators round up and keep holes.
SLACK = 1.25

# What DALI has loaded and set up once it runs, whatever it decodes; 58 MiB were seen on the CPU.
BASE_BYTES = 2**26


def estimate_bytes(
    pixels: int, augmentation: Augmentation, *, micro_batch: int, threads: int
) -> int:
    """Memory that DALI takes at most for sub-batches of `pixels`, device and page-locked together.

    A model, checked against resident memory on the CPU; not run on a GPU. Not in it: the CUDA
    context, and the encoded files that are read ahead (prefetch · micro_batch · file size).

    Args:
        pixels: a sub-batch's, of the whole images; a file's bytes count as pixels too.
        augmentation: gives sizes, channels and the aspect of the crops.
        micro_batch: images of a sub-batch, at most.
        threads: that decode.
    """
    C = augmentation.channels
    view = math.prod(augmentation.size) * C
    # the sub-batches in work and the one handed out: encoded, cropped, resized, flipped
    batches = (SCHEDULED + 1) * (pixels + pixels * C + 2 * micro_batch * view)
    decoders = threads * int(pixels * LARGEST_SHARE) * (DEVICE_WORKSPACE + 2 * HOST_WORKSPACE)
    # Between the passes of a resize, an image is as wide as its crop and as high as the view (or
    # the other way round), in float32. A crop's longer side is at most √(aspect · pixels), and the
    # sum over a sub-batch of n images at most √(n · aspect · pixels) by Cauchy-Schwarz.
    aspect = max(augmentation.ratio[1], 1 / augmentation.ratio[0], 1.0)
    sides = math.sqrt(min(RESIZED_AT_ONCE, micro_batch) * aspect * pixels)
    between = 4 * C * max(augmentation.size) * sides
    return BASE_BYTES + int(SLACK * (batches + decoders + between))


def largest_sub_batch(
    memory_bytes: int, augmentation: Augmentation, *, micro_batch: int, threads: int
) -> int:
    """The pixels of a sub-batch for which `estimate_bytes` stays within `memory_bytes`.

    Raises:
        DataError: too little memory; names the least that works.
    """

    def needed(pixels: int) -> int:
        return estimate_bytes(pixels, augmentation, micro_batch=micro_batch, threads=threads)

    if needed(MIN_PIXELS) > memory_bytes:
        least = math.ceil(needed(MIN_PIXELS) / 2**20)
        raise DataError(
            f"data.dali_memory_mib={memory_bytes // 2**20} is too little for micro-batches of "
            f"{micro_batch} and {threads} threads: {least} is the least that works"
        )
    low, high = MIN_PIXELS, MAX_SUB_BATCH_PIXELS
    while high - low > MIN_PIXELS // 64:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= memory_bytes else (low, middle)
    return low
