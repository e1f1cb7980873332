"""The plan of a pack: which image stands where; and the shards that are made by it."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim import files
from simmim.data.decode import UnreadableImage
from simmim.data.labels import Labels
from simmim.data.names import printable
from simmim.data.shard_index import (
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
from simmim.packing.dataset_file import common_channels, write_dataset
from simmim.packing.encode import TooLarge, encode
from simmim.packing.members import check_members, dali_index, write_member
from simmim.packing.options import Options
from simmim.packing.tasks import Tally
from simmim_kernels.splitmix import fold, permutation

SKIPPED_FILE = "skipped.tsv"

# Keeps the shuffle apart from other uses of the same seed.
STREAM = 0x7061636B  # "pack"

# So many unreadable images in a row, within a shard, mean that the disk is gone, not that an image
# is broken.
MAX_UNREADABLE_IN_A_ROW = 1000

# Files that a pack that was killed leaves behind.
TEMPORARY = re.compile(r"\..*\.tmp-\d+")


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
            if any(not TEMPORARY.fullmatch(name) for name in os.listdir(folder)):
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
            write_dataset(folder, dataset)
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
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise DataError(
                f"{folder}: not one image could be packed ({counts}); {SKIPPED_FILE} there names "
                "each"
            )
        dataset["images"], dataset["skipped"] = images, len(skipped)
        dataset["channels"] = common_channels(channels)
        write_dataset(folder, dataset)
        return Summary(images, shards, before, after, reasons)


class _NoImages(Exception):
    """A shard whose images were all skipped."""


def is_done(folder: Path, number: int) -> bool:
    """Whether shard `number` is whole: its index is there, which is renamed last."""
    try:
        index = read_index(folder / f"{shard_name(number)}.tar")
        return not index.name or (folder / f"{shard_name(number)}.idx").is_file()
    except DataError:
        return False


def _reason(error: OSError | UnreadableImage) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    kind = "too many pixels" if isinstance(error, TooLarge) else "unreadable"
    if isinstance(error, OSError):
        kind = "changed" if "changed while" in text else "not read"
    return printable(f"{kind}: {text}")
