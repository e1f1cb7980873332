"""Whether DALI decodes the pixels of the CPU path, found out before the first batch."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from simmim.data.augment import resized
from simmim.data.dali.decoder import Decoder
from simmim.data.dali.samples import PreparedSample
from simmim.data.decode import EXIF_ORIENTATION, decode
from simmim.errors import DataError

# DALI may differ from the CPU path by this much on a smooth picture, in levels, on average.
MAX_DIFFERENCE = 2.0


def agreeing_orientations(decoder: Decoder, report: Callable[[str], None]) -> frozenset[int]:
    """The EXIF orientations that DALI decodes as the CPU path does, by decoding a picture.

    Decoders of different GPUs are different programs, and a box that is cut before the turn would
    go unnoticed in training.

    Args:
        decoder: idle.
        report: told, in a line, when some orientations are decoded otherwise.

    Raises:
        DataError: even upright images are decoded otherwise.
    """
    agreeing, augmentation = set(), decoder.augmentation
    for orientation in range(1, 9):
        data, box = probe_image(orientation), (20, 30, 70, 50)
        theirs = torch.empty((1, *augmentation.size, augmentation.channels))
        decoder.schedule([PreparedSample(0, 0, data, 1, box, True)])
        decoder.collect(theirs, [0])
        ours = resized(decode(data, augmentation.channels), box, augmentation.size, flip=True)
        difference = float(np.abs(theirs[0].numpy() - ours.astype(np.float32)).mean())
        if difference <= MAX_DIFFERENCE:
            agreeing.add(orientation)
        elif orientation == 1:
            raise DataError(
                f"DALI's pixels differ from the CPU path's by {difference:.1f} levels on "
                "average; use data.backend=cpu"
            )
    if len(agreeing) < 8:
        report("DALI turns images by EXIF otherwise than we do: they are decoded here")
    return frozenset(agreeing)


def probe_image(orientation: int) -> bytes:
    """A smooth JPEG of 160 × 120 pixels without any symmetry."""
    down, right = np.mgrid[0:120, 0:160] / 160
    bands = [200 * right + 20, 200 * down + 30, 120 * right * down + 60]
    image = Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()
