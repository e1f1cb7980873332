"""The exact mean and standard deviation of the pixels of a source, or of a packed folder."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.decode import UnreadableImage, decode
from simmim.data.shard_index import read_dataset
from simmim.data.shards import ShardSource
from simmim.data.source import Source, is_machine_fault
from simmim.errors import DataError
from simmim.packing.dataset_file import channels_of, common_channels, value_range_of, write_dataset
from simmim.packing.tasks import Tally, Tasks

# Images that a process takes at a time.
CHUNK = 256

# Pixels that are counted at a time: their numbers take eight bytes each.
_BLOCK = 2**22


@dataclass
class Statistics:
    """Exact sums over pixels; images of several numbers of channels are kept apart.

    Attributes:
        sums: channels → (pixels, sum of each channel, sum of its squares).
        images: channels → number of images.
        skipped: images that could not be read.
    """

    sums: dict[int, tuple[int, list[int], list[int]]] = field(default_factory=dict)
    images: Counter[int] = field(default_factory=Counter)
    skipped: int = 0

    def add(self, image: NDArray[np.uint8]) -> None:
        """Add an image, [H, W, C]."""
        channels = image.shape[2]
        values = np.arange(256)
        flat = image.reshape(-1, channels)
        counts = np.zeros((channels, 256), dtype=np.int64)
        for start in range(0, len(flat), _BLOCK):
            for channel in range(channels):
                block = flat[start : start + _BLOCK, channel]
                counts[channel] += np.bincount(block, minlength=256)
        self._add(
            channels, len(flat), (counts @ values).tolist(), (counts @ values**2).tolist(), images=1
        )

    def merge(self, other: "Statistics") -> None:
        """Add the sums of other images."""
        for channels, (pixels, sums, squares) in other.sums.items():
            self._add(channels, pixels, sums, squares, images=other.images[channels])
        self.skipped += other.skipped

    def _add(
        self, channels: int, pixels: int, sums: list[int], squares: list[int], *, images: int
    ) -> None:
        zeros = [0] * channels
        before = self.sums.get(channels, (0, zeros, zeros))
        self.sums[channels] = (
            before[0] + pixels,
            [a + b for a, b in zip(before[1], sums)],
            [a + b for a, b in zip(before[2], squares)],
        )
        self.images[channels] += images

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per channel, of values from 0 to 1; grey among RGB counts as RGB.

        Raises:
            DataError: no image, or numbers of channels that have no common statistics.
        """
        channels = common_channels(set(self.sums))
        if channels is None:
            counts = ", ".join(f"{n} images of {c}" for c, n in sorted(self.images.items()))
            raise DataError(
                f"no mean and std: {counts} channels"
                if counts
                else "no mean and std: no image was read"
            )
        whole = Statistics()
        for number, (pixels, sums, squares) in self.sums.items():
            times = channels // number
            whole._add(channels, pixels, sums * times, squares * times, images=0)
        pixels, sums, squares = whole.sums[channels]
        mean = [s / (pixels * 255) for s in sums]
        # n·Σv² - (Σv)² in integers: no digits cancel
        std = [math.sqrt(pixels * q - s * s) / (pixels * 255) for s, q in zip(sums, squares)]
        return mean, std


def statistics(
    source: Source,
    *,
    workers: int = 1,
    max_pixels: int,
    value_range: tuple[float, float] | None = None,
    channels: int | None = None,
    tick: Callable[[int, int], None] = lambda done, skipped: None,
) -> Statistics:
    """Sums over all pixels of all readable images of a source, as they are, upright.

    Args:
        source: images.
        workers: processes; the sums do not depend on it.
        max_pixels: larger images are skipped.
        value_range: the values that become 0 and 255 where files hold other than 8 bits.
        channels: that every image is given; None keeps each file's own.
        tick: called now and then with the images done and skipped.

    Raises:
        RunError: a process died.
    """
    count = len(source.names)

    def add_chunk(number: int, tally: Tally) -> Statistics:
        part = Statistics()
        for sample in range(number * CHUNK, min(count, (number + 1) * CHUNK)):
            try:
                data = source.read(sample)
                part.add(decode(data, channels, max_pixels=max_pixels, value_range=value_range))
                tally.add(done=1)
            except (OSError, UnreadableImage) as error:
                if is_machine_fault(error):
                    raise
                part.skipped += 1
                tally.add(skipped=1)
        return part

    tasks = Tasks(add_chunk, workers, f"images {{}}·{CHUNK} and following")
    whole = Statistics()
    for _, part in tasks.results(range(-(-count // CHUNK)), lambda tally: tick(*tally.total())):
        whole.merge(part)
    return whole


def pack_statistics(
    folder: Path, *, workers: int = 1, max_pixels: int, tick: Callable[[int, int], None]
) -> tuple[list[float], list[float]]:
    """Mean and std of a packed folder's images, kept in its dataset.json; see `statistics`.

    Raises:
        DataError: see `Statistics.mean_and_std`.
    """
    dataset: dict[str, Any] = read_dataset(folder)
    if dataset["mean"] and dataset["std"]:
        return dataset["mean"], dataset["std"]
    source = ShardSource.of_pack(folder)
    # an array does not say which axis is channels: its reader must be told how many there are
    common = dataset["channels"]
    sums = statistics(
        source,
        workers=workers,
        max_pixels=max_pixels,
        value_range=value_range_of(dataset),
        channels=channels_of(dataset) or (common if common and common > 4 else None),
        tick=tick,
    )
    try:
        mean, std = sums.mean_and_std()
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    dataset["mean"], dataset["std"] = mean, std
    write_dataset(folder, dataset)
    return mean, std
