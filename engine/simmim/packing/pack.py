"""Packs images into tar shards of downscaled JPEGs, with the indices to read them.

Shard i holds the images [i·n, (i+1)·n) of the plan, less what was skipped, so every shard is a
pure function of the source and the options: any number of processes makes the same bytes, and a
pack that was killed goes on where it stopped. A shard counts as done once its index is there, and
the index is renamed last.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from simmim import files
from simmim.data.augment import resized
from simmim.data.decode import MAX_PIXELS, UnreadableImage, decode, read_header
from simmim.data.labels import Labels
from simmim.data.names import printable
from simmim.data.shard_index import (
    DATASET_FILE,
    DATASET_FORMAT,
    VERSION,
    ShardIndex,
    is_pack,
    read_dataset,
    read_index,
    shard_name,
)
from simmim.data.source import Source, is_machine_fault
from simmim.errors import DataError, RunError
from simmim.packing.members import check_members, dali_index, write_member
from simmim.packing.tasks import Tally, Tasks
from simmim_kernels.splitmix import fold, permutation

SKIPPED_FILE = "skipped.tsv"

# Keeps the shuffle apart from other uses of the same seed.
STREAM = 0x7061636B  # "pack"

# JPEG's own limit is 65535.
MAX_JPEG_SIDE = 65500

# Images that cannot be read in a row, within a shard: the disk is gone, not an image broken.
MAX_UNREADABLE_IN_A_ROW = 1000

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
_TEMPORARY = re.compile(r"\..*\.tmp-\d+")


@dataclass(frozen=True)
class Options:
    """What decides over the bytes of a pack, besides its source.

    Attributes:
        short_side: pixels that the shorter side has at most; None where originals are kept.
        quality: of JPEGs that are encoded.
        keep_originals: keep every image's bytes, once it has been decoded.
        images_per_shard: places of the plan that make a shard.
        shuffle: seed of the order; None keeps the source's.
        max_pixels: larger images are skipped before they are decoded.
        value_range: the values that become 0 and 255 where files hold other than 8 bits.
        channels: that every image is given; None keeps each file's own.
    """

    short_side: int | None = 256
    quality: int = 90
    keep_originals: bool = False
    images_per_shard: int = 4096
    shuffle: int | None = None
    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None
    channels: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The options as dataset.json holds them."""
        found = asdict(self)
        return found | {"value_range": self.value_range and list(self.value_range)}


@dataclass(frozen=True)
class Summary:
    """What a finished pack holds.

    Attributes:
        images: packed.
        shards: that hold images.
        bytes_before: of the packed images in their source.
        bytes_after: of the packed images.
        skipped: reason, without its details → number of images.
    """

    images: int
    shards: int
    bytes_before: int
    bytes_after: int
    skipped: Counter[str]


class Encoded(NamedTuple):
    """An image as it is packed; sizes are upright."""

    data: bytes
    extension: str
    width: int
    height: int
    channels: int


def pack(
    source: Source,
    folder: Path,
    options: Options,
    labels: Labels | None = None,
    *,
    workers: int = 1,
    tick: Callable[[int, int, int], None] = lambda done, skipped, resumed: None,
) -> Summary:
    """Pack a source into `folder`, or go on where an earlier call was stopped.

    Args:
        source: images.
        folder: new, empty, or an earlier pack of the same source with the same options.
        options: see there.
        labels: of the source's images.
        workers: processes; the result does not depend on it.
        tick: called now and then with the images packed and skipped by this call, and those of
            the shards that were there before.

    Raises:
        DataError: `folder` holds something else, or no image could be packed.
        RunError: `folder` cannot be written, a process died, or the source's disk is gone.
    """
    plan = Plan(source, options, labels)
    try:
        with _claimed(folder) as lock:
            dataset = plan.begin(folder)
            try:
                todo = [n for n in range(plan.num_shards) if not _is_done(folder, n)]
                if todo and dataset["images"] is not None:
                    dataset["images"] = None
                    _write_dataset(folder, dataset)
                resumed = sum(plan.places(n) for n in set(range(plan.num_shards)) - set(todo))
                tasks = Tasks(
                    lambda number, tally: plan.write_shard(folder, number, tally),
                    workers,
                    f"{folder}/{{:06d}}.tar",
                    # one that outlives a killed pack for a moment must not hold the lock
                    to_close=[lock],
                )
                for _ in tasks.results(todo, lambda tally: tick(*tally.total(), resumed)):
                    pass
                return plan.finish(folder, dataset)
            finally:
                _remove_temporaries(folder)
    except OSError as error:
        raise RunError(
            f"{error.filename or folder}: {error.strerror or error}; what is finished stays, the "
            "same command goes on"
        ) from None


class Plan:
    """Which image of a source stands where in its pack."""

    def __init__(self, source: Source, options: Options, labels: Labels | None) -> None:
        self.source, self.options, self.labels = source, options, labels
        self.num_images = len(source.names)
        self.num_shards = -(-self.num_images // options.images_per_shard)
        self._order: NDArray[np.int64] | None = (
            None
            if options.shuffle is None
            else permutation(fold(STREAM, options.shuffle), self.num_images)
        )

    def places(self, number: int) -> int:
        """The number of images that shard `number` has places for."""
        size = self.options.images_per_shard
        return min(size, self.num_images - number * size)

    def digest(self) -> str:
        """A hash of all that decides over the pack: names, labels, options."""
        parts: dict[str, Any] = {"names": self.source.names.digest(), "images": self.num_images}
        if self.labels is not None:
            values = hashlib.sha256(self.labels.values.astype("<i8").tobytes()).hexdigest()
            parts["labels"] = [values, *self.labels.classes]
        text = json.dumps(parts | self.options.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def begin(self, folder: Path) -> dict[str, Any]:
        """The contents of dataset.json, which is written where `folder` is empty.

        Raises:
            DataError: `folder` holds something else.
        """
        if not is_pack(folder):
            if any(not _TEMPORARY.fullmatch(name) for name in os.listdir(folder)):
                raise DataError(f"{folder}: not empty, and no pack; choose another folder")
            dataset: dict[str, Any] = {
                "format": DATASET_FORMAT,
                "version": VERSION,
                "images": None,
                "shards": self.num_shards,
                "channels": None,
                "options": self.options.to_json(),
                "classes": None if self.labels is None else list(self.labels.classes),
                "mean": None,
                "std": None,
                "skipped": None,
                "plan": self.digest(),
            }
            _write_dataset(folder, dataset)
            return dataset
        dataset = read_dataset(folder)
        remedy = "choose another folder, or delete this one"
        for name, value in self.options.to_json().items():
            before = dataset["options"].get(name)
            if before != value:
                raise DataError(f"{folder}: packed with {name} {before}, not {value}; {remedy}")
        if dataset["plan"] != self.digest() or dataset["shards"] != self.num_shards:
            raise DataError(f"{folder}: packed from other images or with other labels; {remedy}")
        return dataset

    def write_shard(self, folder: Path, number: int, tally: Tally) -> None:
        """Make shard `number`: the tar, read back and checked, DALI's index, then its own index.

        Raises:
            RunError: what was written is not what is read back, or the source's disk is gone.
            OSError: the folder cannot be written.
        """
        shard = folder / f"{shard_name(number)}.tar"
        index = ShardIndex(label=None if self.labels is None else [])

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                self._write_members(file, number, index, tally)
                file.flush()
                os.fsync(file.fileno())
                # what is read back should come from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            problems = check_members(temporary, index)
            if problems:
                raise RunError(f"{shard}: not what was written ({problems[0]}); is the disk sound?")
            tally.end_if_orphaned()
            if not index.name:
                raise _NoImages

        # DALI refuses a shard without images: of that, only the index is kept
        with suppress(_NoImages):
            files.write_atomic(shard, write)
            files.write_text(shard.with_suffix(".idx"), dali_index(index))
        files.write_text(shard.with_suffix(".json"), index.to_json())

    def _write_members(
        self, file: io.BufferedWriter, number: int, index: ShardIndex, tally: Tally
    ) -> None:
        unreadable = 0
        first = number * self.options.images_per_shard
        for place in range(first, first + self.places(number)):
            sample = place if self._order is None else int(self._order[place])
            name = printable(self.source.names[sample])
            try:
                data = self.source.read(sample)
                unreadable = 0
                image = encode(data, self.options)
            except (OSError, UnreadableImage) as error:
                if is_machine_fault(error):
                    raise
                if isinstance(error, OSError):
                    unreadable += 1
                if unreadable >= MAX_UNREADABLE_IN_A_ROW:
                    raise RunError(
                        f"the last {unreadable} images could all not be read ({name}: {error}); "
                        "is the disk still there?"
                    ) from None
                index.skipped.append((name, _reason(error)))
                tally.add(skipped=1)
                continue
            key = f"{place:08d}"
            index.name.append(f"{key}.{image.extension}")
            index.offset.append(write_member(file, index.name[-1], image.data))
            index.size.append(len(image.data))
            index.sha256.append(hashlib.sha256(image.data).hexdigest())
            index.source.append(name)
            index.width.append(image.width)
            index.height.append(image.height)
            index.channels.append(image.channels)
            index.source_bytes += len(data)
            if index.label is not None and self.labels is not None:
                label = int(self.labels.values[sample])
                index.label.append(label)
                if label >= 0:
                    write_member(file, f"{key}.cls", str(label).encode())
            tally.add(done=1)
        # two blocks of zeros, and full records, as tar itself writes
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
        index.shard_bytes = file.tell()

    def finish(self, folder: Path, dataset: dict[str, Any]) -> Summary:
        """Write skipped.tsv and dataset.json from the indices of all shards.

        Raises:
            DataError: no image could be packed.
        """
        before = after = images = shards = 0
        skipped = [(printable(n), printable(r)) for n, r in getattr(self.source, "skipped", [])]
        channels: set[int] = set()
        for number in range(self.num_shards):
            index = read_index(folder / f"{shard_name(number)}.tar")
            images, shards = images + len(index.name), shards + bool(index.name)
            before, after = before + index.source_bytes, after + sum(index.size)
            skipped += index.skipped
            channels |= set(index.channels)
        reasons = Counter(reason.split(":", 1)[0] for _, reason in skipped)
        rows = ["source\treason", *(f"{name}\t{reason}" for name, reason in skipped)]
        files.write_text(folder / SKIPPED_FILE, "\n".join(rows) + "\n")
        if not images:
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise DataError(
                f"{folder}: not one image could be packed ({told}); {SKIPPED_FILE} there names each"
            )
        dataset["images"], dataset["skipped"] = images, len(skipped)
        dataset["channels"] = common_channels(channels)
        _write_dataset(folder, dataset)
        return Summary(images, shards, before, after, reasons)


def common_channels(found: set[int]) -> int | None:
    """The number of channels that images share, grey counting as RGB among RGB; None if mixed."""
    return max(found) if len(found) == 1 or found == {1, 3} else None


def encode(data: bytes, options: Options) -> Encoded:
    """An image as it is packed: downscaled, upright, as JPEG where 1 or 3 channels allow it.

    Downscaling is Lanczos with antialiasing, as Pillow does it. A plain JPEG (grey, YCbCr or RGB)
    that is small and upright keeps its bytes. 2 and 4 channels become PNG, more .npy [H, W, C].

    Raises:
        UnreadableImage: no complete image, or one of too many pixels.
    """
    header = read_header(data)
    if header.width * header.height > options.max_pixels:
        raise _TooLarge(f"{header.width}×{header.height}")
    pixels = decode(
        data,
        options.channels,
        max_pixels=options.max_pixels,
        value_range=options.value_range,
    )
    height, width, channels = pixels.shape
    if options.keep_originals:
        extension = _EXTENSIONS.get(header.format, header.format.lower())
        return Encoded(data, extension, width, height, channels)
    short, side = min(width, height), options.short_side or 0
    if short > side:
        # rounded half up, in integers: the same on every machine
        width, height = ((2 * length * side + short) // (2 * short) for length in (width, height))
        pixels = resized(
            pixels, (0, 0, pixels.shape[1], pixels.shape[0]), (height, width), filter="lanczos"
        )
    elif header.plain and header.orientation == 1 and header.channels == channels:
        return Encoded(data, "jpg", width, height, channels)
    if channels > 4:
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        return Encoded(buffer.getvalue(), "npy", width, height, channels)
    if channels in (1, 3) and max(width, height) <= MAX_JPEG_SIDE:
        colour, sampling = ("GRAY", "Gray") if channels == 1 else ("RGB", "420")
        encoded = simplejpeg.encode_jpeg(pixels, options.quality, colour, sampling)
        return Encoded(bytes(encoded), "jpg", width, height, channels)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "png", width, height, channels)


class _NoImages(Exception):
    """A shard whose images were all skipped."""


class _TooLarge(UnreadableImage):
    """Above the limit of pixels; the message is its size."""


def _reason(error: OSError | UnreadableImage) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    kind = "too many pixels" if isinstance(error, _TooLarge) else "unreadable"
    if isinstance(error, OSError):
        kind = "changed" if "changed while" in text else "not read"
    return printable(f"{kind}: {text}")


def _is_done(folder: Path, number: int) -> bool:
    try:
        index = read_index(folder / f"{shard_name(number)}.tar")
        return not index.name or (folder / f"{shard_name(number)}.idx").is_file()
    except DataError:
        return False


def _write_dataset(folder: Path, dataset: dict[str, Any]) -> None:
    files.write_text(folder / DATASET_FILE, json.dumps(dataset, indent=1) + "\n")


def _remove_temporaries(folder: Path) -> None:
    for name in os.listdir(folder):
        if _TEMPORARY.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _claimed(folder: Path) -> Generator[int, None, None]:
    """`folder`, made if needed, and locked against a second pack; gives the lock's descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another simmim pack is at work in it") from None
        except OSError:
            pass  # some network file systems cannot lock a folder
        yield descriptor
    finally:
        os.close(descriptor)
