"""Where images come from: a folder of files, or tar shards with random access. Bytes out."""

import hashlib
import json
import os
import stat
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.errors import RunError

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .avif".split()
)


# Descriptors that one process keeps open; machines commonly allow 1024 in all.
MAX_OPEN_SHARDS = 64


class DataError(RunError):
    """Data that cannot be trained on; one line that names the folder or file."""


class Source(Protocol):
    """Random access to encoded images."""

    names: "PackedStrings"

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`; raises OSError when they cannot be read."""


class PackedStrings(Sequence[str]):
    """Many strings in two arrays, which forked worker processes share without copies."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start = int(self._ends[index - 1]) if index else 0
        return (
            self._bytes[start : int(self._ends[index])].tobytes().decode("utf-8", "surrogateescape")
        )

    def digest(self) -> str:
        """A hash of all the strings in order."""
        return hashlib.sha256(self._bytes.tobytes() + self._ends.tobytes()).hexdigest()[:16]


def is_image(name: str) -> bool:
    """Whether a file name looks like an image's; hidden files do not."""
    stem = name.rsplit("/", 1)[-1]
    return not stem.startswith(".") and os.path.splitext(stem)[1].lower() in EXTENSIONS


class FolderSource:
    """Every image file below a folder, in the order of their relative paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found: list[str] = []
        seen: set[tuple[int, int]] = set()  # links may lead in circles
        for folder, subfolders, files in os.walk(root, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            if {".lock", "run.json"} <= set(files):  # a run's own pictures are no photos
                subfolders.clear()
                continue
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            relative = os.path.relpath(folder, root)
            prefix = "" if relative == "." else relative + "/"
            found += [prefix + name for name in files if is_image(name)]
        self.names = PackedStrings(sorted(found))

    def read(self, index: int) -> bytes:
        # without O_NONBLOCK a named pipe in the folder would be waited for without end
        descriptor = os.open(self.root / self.names[index], os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("not a regular file")
            return file.read()


class ShardSource:
    """Every image in a list of tar files, read by offset; plain tar reads the same files.

    The index (offset and size of every member) is made by one pass over the tar headers and kept
    in the user's cache folder, so that the next run starts at once.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        names: list[str] = []
        places: list[tuple[int, int, int]] = []  # shard, offset, size
        for number, shard in enumerate(self.shards):
            for name, offset, size in tar_index(shard):
                names.append(f"{shard.name}/{name}")
                places.append((number, offset, size))
        self.names = PackedStrings(names)
        self._places: NDArray[np.int64] = np.array(places, dtype=np.int64).reshape(-1, 3)
        # (process, shard) → descriptor, the last used at the end
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(value) for value in self._places[index])
        # pread has no file position, but a forked worker still opens its own descriptor
        key = (os.getpid(), shard)
        if key not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[key] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(key)
        data = os.pread(self._files[key], size, offset)
        if len(data) != size:
            raise OSError(f"the shard ends inside this image ({len(data)} of {size} bytes)")
        return data


def tar_index(shard: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of every image in a tar file, in file order; cached by size and date.

    Raises:
        DataError: not a readable, uncompressed tar file.
    """
    cache: Path | None = None
    try:
        status = shard.stat()
        key = f"{shard.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        cache = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if cache.is_file():
            return [(str(n), int(o), int(size)) for n, o, size in json.loads(cache.read_text())]
    except (OSError, ValueError, TypeError):
        pass  # no cache, or not one of ours: scan, and write it anew
    entries: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isreg() and is_image(member.name):
                    name = member.name.removeprefix("./")
                    entries.append((name, member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        if entries:
            return entries  # cut off: what is there can be read, the last image says why it can't
        hint = (
            " (compressed shards have no random access: unpack them)" if _compressed(shard) else ""
        )
        raise DataError(f"{shard}: not a readable tar file: {error}{hint}") from None
    if cache is not None:
        _write_cache(cache, json.dumps(entries))
    return entries


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


def open_source(path: str) -> Source:
    """The images that `data.path` means.

    Args:
        path: a folder of images in any layout, a folder of .tar shards, or one .tar file.

    Raises:
        DataError: nothing there, or no image in it; names the path.
    """
    root = Path(os.path.expanduser(path))
    if not root.exists():
        raise DataError(f"data.path={path}: no such file or folder")
    source: Source
    if root.is_file():
        source = ShardSource([root])
    else:
        source = FolderSource(root)
        if not len(source.names):
            shards = sorted(p for p in root.rglob("*.tar") if p.is_file())
            source = ShardSource(shards)
    if not len(source.names):
        some = " ".join(sorted(EXTENSIONS)[:12])
        raise DataError(f"data.path={path}: no image and no .tar shard of images in it ({some} …)")
    return source
