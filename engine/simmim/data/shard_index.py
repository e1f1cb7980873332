"""The files of a packed folder: shards, their indices, and dataset.json over all.

All of them may come from outside: whatever an index says is checked before it is used.
"""

import json
import operator
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.labels import MAX_CLASSES
from simmim.data.names import printable
from simmim.errors import DataError

DATASET_FILE = "dataset.json"
DATASET_FORMAT, SHARD_FORMAT, VERSION = "simmim-pack", "simmim-shard", 1

# No shard is larger, whatever its index says.
MAX_SHARD_BYTES = 2**50


@dataclass
class ShardContents:
    """The images of one shard, in file order.

    Attributes:
        names: of the members.
        places: int64 [N, 2], offset and size, bytes.
        labels: int64 [N]; -1 where an image has none.
        sizes: int32 [N, 2], width and height, where an index tells them.
        skipped: (name, reason) of members that look like images and are none.
    """

    names: list[str]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)


def shard_name(number: int) -> str:
    """The stem of a packed folder's shard: six digits, more where they do not suffice."""
    return f"{number:06d}"


def is_pack(folder: Path) -> bool:
    """Whether a folder is a packed one, be it unfinished or damaged."""
    path = folder / DATASET_FILE
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_bytes())["format"] == DATASET_FORMAT)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return (folder / f"{shard_name(0)}.json").exists()


def read_dataset(folder: Path) -> dict[str, Any]:
    """The checked contents of a packed folder's dataset.json.

    Raises:
        DataError: missing, damaged, or of another version.
    """
    path = folder / DATASET_FILE
    dataset = _read_json(path, DATASET_FORMAT)
    classes, images = dataset.get("classes"), dataset.get("images", -1)
    for name, fits in (
        ("shards", _is_count(dataset.get("shards"))),
        ("images", images is None or _is_count(images)),  # null until it is finished
        ("classes", classes is None or _is_list_of(classes, str)),
        ("channels", dataset.get("channels") is None or _is_count(dataset["channels"])),
        ("options", isinstance(dataset.get("options"), dict)),
        ("plan", isinstance(dataset.get("plan"), str)),
    ):
        if not fits:
            value = printable(str(dataset.get(name))[:40])
            raise DataError(f"{path}: damaged: {name} is {value}")
    return dataset


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; copy it again, or pack anew") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {str(error)[:80]}") from None
    if not isinstance(value, dict) or value.get("format") != expected:
        raise DataError(f"{path}: no index of simmim pack")
    if value.get("version") != VERSION:
        version = printable(str(value.get("version"))[:20])
        raise DataError(f"{path}: version {version}, this simmim reads {VERSION}")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**40


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {kind}


@dataclass
class ShardIndex:
    """The index of one packed shard, column by column; row i is image i of the shard.

    Attributes:
        name: members, KEY.extension.
        offset: bytes.
        size: bytes.
        sha256: of the bytes, hexadecimal.
        source: where the image came from.
        width: pixels, upright.
        height: pixels, upright.
        channels: as decoded.
        label: class numbers, -1 for none; None where the dataset has no labels.
        shard_bytes: of the tar file.
        source_bytes: of the images before they were packed.
        skipped: (source, reason) of the images that were left out.
    """

    name: list[str] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    label: list[int] | None = None
    shard_bytes: int = 0
    source_bytes: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> str:
        """The text of the index file."""
        value = {"format": SHARD_FORMAT, "version": VERSION, **self.__dict__}
        return json.dumps(value, separators=(",", ":")) + "\n"

    def contents(self) -> ShardContents:
        """The same as arrays."""
        count = len(self.name)
        places = np.array([self.offset, self.size], dtype=np.int64).T.reshape(-1, 2)
        sizes = np.array([self.width, self.height], dtype=np.int32).T.reshape(-1, 2)
        labels = np.full(count, -1) if self.label is None else np.array(self.label, dtype=np.int64)
        return ShardContents(self.name, places, labels.astype(np.int64), sizes)


def read_index(shard: Path, *, whole: bool = True) -> ShardIndex:
    """The checked index of a packed shard.

    Args:
        shard: the tar file.
        whole: refuse a shard that ends before its last image. Otherwise what is there can be read,
            and the others say what they lack when they are.

    Raises:
        DataError: shard or index missing, damaged, or at odds; names the file.
    """
    path = shard.with_suffix(".json")
    value = _read_json(path, SHARD_FORMAT)
    names = value.get("name")
    count = len(names) if isinstance(names, list) else 0
    try:
        end = shard.stat().st_size if count else 0  # one without images is not there
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}; copy it again, or pack anew") from None
    limit = value.get("shard_bytes")
    if type(limit) is not int or not 0 <= limit < MAX_SHARD_BYTES:
        raise DataError(f"{path}: damaged: shard_bytes is {printable(str(limit)[:40])}")
    if count and (end > limit or (whole and end < limit)):
        raise DataError(
            f"{shard}: has {end} bytes, {limit} were packed; copy it again, or pack anew"
        )
    for column in ("name", "sha256", "source"):
        if not _is_list_of(value.get(column), str) or len(value[column]) != count:
            raise DataError(f"{path}: damaged: {column} is no list of {count} strings")
    numbers = {
        "offset": (tarfile.BLOCKSIZE, limit),
        "size": (0, limit),
        "width": (1, 2**31 - 1),
        "height": (1, 2**31 - 1),
        "channels": (1, 2**31 - 1),
        "label": (-1, MAX_CLASSES - 1),
    }
    for column, (low, high) in numbers.items():
        values: Any = value.get(column)
        if column == "label" and values is None:
            continue
        if not _is_list_of(values, int) or len(values) != count:
            raise DataError(f"{path}: damaged: {column} is no list of {count} integers")
        least, most = min(values, default=low), max(values, default=low)
        if count and not low <= least <= most <= high:
            raise DataError(
                f"{path}: damaged: {column} from {least} to {most}, possible are {low} to {high} "
                f"(the shard has {limit} bytes)"
            )
    ends = map(operator.add, value["offset"], value["size"])
    if max(ends, default=0) > limit:
        raise DataError(f"{path}: damaged: an image ends behind the {limit} bytes of the shard")
    skipped = value.get("skipped", [])
    if not _is_count(value.get("source_bytes")) or not (
        _is_list_of(skipped, list) and all(len(s) == 2 and _is_list_of(s, str) for s in skipped)
    ):
        raise DataError(f"{path}: damaged: source_bytes or skipped")
    columns = {name: value.get(name) for name in ShardIndex.__dataclass_fields__}
    return ShardIndex(**columns | {"skipped": [(name, reason) for name, reason in skipped]})
