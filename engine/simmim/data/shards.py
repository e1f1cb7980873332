"""Tar shards with random access, indexed by a pass over their headers or by a packed folder.

A packed folder is what `simmim pack` writes: plain tar shards, beside each a JSON index of columns,
and dataset.json over all. Names, sizes and offsets in all of these come from outside and are
checked before they are used.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.labels import MAX_CLASSES, Labels
from simmim.data.names import printable
from simmim.data.shard_index import (
    DATASET_FILE,
    ShardContents,
    read_dataset,
    read_index,
    shard_name,
)
from simmim.data.source import MAX_FILE_BYTES, PackedStrings, is_array, is_image
from simmim.errors import DataError

# Descriptors that one process keeps open; machines commonly allow 1024 in all.
MAX_OPEN_SHARDS = 64

# Names and extended attributes are far smaller; tarfile reads such a header in one piece.
MAX_HEADER_BYTES = 2**20

# A class number is a few digits.
MAX_LABEL_BYTES = 32

_MAX_SIZE = 2**62


class ShardSource:
    """Every image in a list of tar files, read by offset; plain tar reads the same files.

    The index (offset and size of every member) is made by one pass over the tar headers and kept
    in the user's cache folder, so that the next run starts at once. A packed folder brings its own.

    Attributes:
        shards: the tar files; of a packed folder, those with images in them.
        names: shard/member of every image.
        labels: of the packed folder, or of .cls members beside the images; None without any.
        sizes: int32 [N, 2], width and height (upright) of a packed folder's images, else None.
        skipped: (shard/member, reason) of members that look like images and are none.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        contents = [scan_tar(shard) for shard in shards]
        if not any(part.names for part in contents):  # then arrays are the images
            contents = [scan_tar(shard, is_array) for shard in shards]
        self._gather(zip(shards, contents), None)

    @classmethod
    def of_pack(cls, folder: Path) -> "ShardSource":
        """The images of a packed folder; reads its indices, not its shards.

        Raises:
            DataError: unfinished, damaged, or a shard is missing; names the file.
        """
        dataset = read_dataset(folder)
        if dataset["images"] is None:
            raise DataError(
                f"{folder}: a pack that is not finished; the same simmim pack command finishes it"
            )
        every = (folder / f"{shard_name(number)}.tar" for number in range(dataset["shards"]))
        contents = ((shard, read_index(shard, whole=False).contents()) for shard in every)
        source = cls.__new__(cls)
        source._gather((pair for pair in contents if pair[1].names), dataset)
        if len(source.names) != dataset["images"]:
            raise DataError(
                f"{folder / DATASET_FILE}: says {dataset['images']} images, the shards' indices "
                f"{len(source.names)}; simmim pack --verify {folder} tells more"
            )
        return source

    def _gather(
        self, shards: Iterable[tuple[Path, ShardContents]], dataset: dict[str, Any] | None
    ) -> None:
        self.shards: list[Path] = []
        self.skipped: list[tuple[str, str]] = []
        names: list[PackedStrings] = []
        places = [np.empty((0, 3), dtype=np.int64)]
        labels = [np.empty(0, dtype=np.int64)]
        sizes = [np.empty((0, 2), dtype=np.int32)]
        for number, (shard, contents) in enumerate(shards):
            self.shards.append(shard)
            prefix = f"{shard.name}/"
            names.append(PackedStrings([prefix + name for name in contents.names]))
            self.skipped += [(prefix + name, reason) for name, reason in contents.skipped]
            column = np.full((len(contents.names), 1), number, dtype=np.int64)
            places.append(np.hstack([column, contents.places]))
            labels.append(contents.labels)
            if contents.sizes is not None:
                sizes.append(contents.sizes)
        self.names = PackedStrings.joined(names)
        self._places: NDArray[np.int64] = np.concatenate(places)
        self.labels = _labels(np.concatenate(labels), dataset)
        self.sizes: NDArray[np.int32] | None = None if dataset is None else np.concatenate(sizes)
        # (process, shard) → descriptor, the last used at the end
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._lock = Lock()

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`; raises OSError when they cannot be read."""
        shard, offset, size = (int(value) for value in self._places[index])
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, more than the limit of {MAX_FILE_BYTES}")
        descriptor = self._descriptor(shard)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise OSError(f"the shard ends inside this image ({len(data)} of {size} bytes)")
        return data

    def _descriptor(self, shard: int) -> int:
        """A descriptor of a shard, the caller's own: another thread may close the one kept here."""
        # pread has no file position, but a forked worker still opens its own descriptor
        key = (os.getpid(), shard)
        with self._lock:
            if key not in self._files:
                if len(self._files) >= MAX_OPEN_SHARDS:
                    os.close(self._files.popitem(last=False)[1])
                self._files[key] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            self._files.move_to_end(key)
            return os.dup(self._files[key])


def _labels(values: NDArray[np.int64], dataset: dict[str, Any] | None) -> Labels | None:
    highest = int(values.max(initial=-1))
    if highest < 0:
        return None
    classes = dataset and dataset["classes"]
    return Labels(values, tuple(classes or (str(number) for number in range(highest + 1))))


class _CheckedHeader(tarfile.TarInfo):
    """A tar header that is refused where its size would make tarfile read, or loop, without end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_CheckedHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        extends = header.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if extends and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def scan_tar(shard: Path, wanted: Callable[[str], bool] = is_image) -> ShardContents:
    """What a pass over the headers of a tar file finds; cached by its path, size and date.

    Links, devices, sparse members and names that lead out of a folder are left out, with a reason.

    Args:
        shard: a tar file.
        wanted: `is_image` or `is_array`.

    Raises:
        DataError: not a readable, uncompressed tar file.
    """
    cache: Path | None = None
    try:
        status = shard.stat()
        key = f"2|{shard.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        cache = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if cache.is_file():
            cached = json.loads(cache.read_text())
            skipped = [(str(name), str(reason)) for name, reason in cached["skipped"]]
            return _contents(cached["images"], skipped, wanted)
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        pass  # no cache, or not one of ours: scan, and write it anew
    images: list[tuple[str, int, int, int]] = []
    skipped = []
    try:
        whole = _scan(shard, images, skipped)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
        if not images:
            raise DataError(
                f"{shard}: not a readable tar file: {error}"
                + (
                    " (compressed shards have no random access: unpack them)"
                    if _compressed(shard)
                    else ""
                )
            ) from None
        # what is there can be read; a last image that was cut off says so when it is read
        skipped.append(("", f"cut off: {error}"))
        whole = False
    if cache is not None and whole:
        _write_cache(cache, json.dumps({"images": images, "skipped": skipped}))
    return _contents(images, skipped, wanted)


def _contents(
    images: Sequence[Sequence[Any]],
    skipped: list[tuple[str, str]],
    wanted: Callable[[str], bool],
) -> ShardContents:
    images = [image for image in images if wanted(str(image[0]))]
    numbers = np.array([image[1:] for image in images], dtype=np.int64).reshape(-1, 3)
    names = [str(image[0]) for image in images]
    return ShardContents(names, numbers[:, :2], numbers[:, 2], skipped=skipped)


def _scan(
    shard: Path, images: list[tuple[str, int, int, int]], skipped: list[tuple[str, str]]
) -> bool:
    """Add (name, offset, size, label) and (name, reason) of members; whether it saw the end."""
    labels: dict[str, int] = {}
    places: list[tuple[str, int, int]] = []
    end = shard.stat().st_size
    whole = True
    with (
        shard.open("rb") as file,
        tarfile.open(fileobj=file, mode="r:", tarinfo=_CheckedHeader) as archive,
    ):
        try:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # a kilobyte each, never used
                if member.size < 0:
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                name = member.name.removeprefix("./")
                problem = _problem(member)
                is_wanted = is_image(name) or is_array(name)
                if is_wanted and problem:
                    skipped.append((name, problem))
                elif is_wanted and not member.isdir():
                    places.append((name, member.offset_data, min(member.size, _MAX_SIZE)))
                elif name.endswith(".cls") and not problem and member.size <= MAX_LABEL_BYTES:
                    label = _class_number(os.pread(file.fileno(), member.size, member.offset_data))
                    labels[name.removesuffix(".cls")] = label
                if member.isreg() and member.offset_data + member.size > end:
                    if not is_wanted or problem:
                        skipped.append((name, "beyond the shard's end, as all that follows it"))
                    whole = False
                    break
            else:
                whole = _ends(file.fileno(), archive.offset, skipped)
        finally:
            images += [(*image, _label_of(image[0], labels)) for image in places]
    return whole


def _problem(member: tarfile.TarInfo) -> str:
    """Why a member is not taken for an image; empty for images and folders."""
    if member.issym() or member.islnk():
        return f"link: to {printable(member.linkname)}"
    if member.issparse():
        return "sparse member"
    if not (member.isreg() or member.isdir()):
        return "not a regular file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "name that leads out of the folder"
    return ""


def _ends(descriptor: int, offset: int, skipped: list[tuple[str, str]]) -> bool:
    # tarfile takes a damaged header for the end of the archive, silently
    block = os.pread(descriptor, tarfile.BLOCKSIZE, offset)
    if not block.strip(b"\0"):
        return True
    skipped.append(("", f"damaged header: at byte {offset}; what follows it is not read"))
    return False


def _class_number(text: bytes) -> int:
    text = text.strip()
    number = int(text) if text.isdigit() else -1
    return number if number < MAX_CLASSES else -1


def _label_of(name: str, labels: dict[str, int]) -> int:
    if not labels:
        return -1
    folder, slash, base = name.rpartition("/")
    key = f"{folder}{slash}{base.split('.', 1)[0]}"  # webdataset's: up to the first dot
    return labels.get(os.path.splitext(name)[0], labels.get(key, -1))


def cache_folder() -> Path:
    """Where shard indices are kept: $XDG_CACHE_HOME/simmim, by default ~/.cache/simmim."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simmim" / "tar-index"


def _compressed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except OSError:
        return False
    return head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"))


def _write_cache(path: Path, text: str) -> None:
    # a cache that cannot be written costs the next run a scan, nothing else
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass
