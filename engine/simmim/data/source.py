"""What a source of encoded images is, and how its files are named and read."""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from typing import Protocol

import numpy as np

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .avif".split()
)


# Arrays count as images only where there are none: photos may have .npy files beside them.
ARRAY_EXTENSION = ".npy"

PARQUET_EXTENSION = ".parquet"

# A larger file is refused: reading it would take the memory of a batch.
MAX_FILE_BYTES = 2**30

# The machine is out of descriptors or memory: no reason to call an image broken.
MACHINE_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


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

    @classmethod
    def joined(cls, parts: Sequence["PackedStrings"]) -> "PackedStrings":
        """The strings of several, in order, without a Python object for each."""
        whole = cls(())
        if parts:
            whole._bytes = np.concatenate([part._bytes for part in parts])
            lengths = [np.diff(part._ends, prepend=0) for part in parts]
            whole._ends = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        return whole

    def digest(self) -> str:
        """A hash of all the strings in order."""
        return hashlib.sha256(self._bytes.tobytes() + self._ends.tobytes()).hexdigest()[:16]


def is_image(name: str) -> bool:
    """Whether a file name looks like an image's; hidden files do not."""
    stem = name.rsplit("/", 1)[-1]
    return not stem.startswith(".") and os.path.splitext(stem)[1].lower() in EXTENSIONS


def is_array(name: str) -> bool:
    """Whether a file name looks like a NumPy array's; hidden files do not."""
    stem = name.rsplit("/", 1)[-1]
    return not stem.startswith(".") and stem.lower().endswith(ARRAY_EXTENSION)


def is_machine_fault(error: Exception) -> bool:
    """Whether an image could not be read for want of descriptors or memory."""
    return isinstance(error, OSError) and error.errno in MACHINE_FAULTS


def read_file(path: str) -> bytes:
    """The bytes of a regular file, as they were at one moment.

    Raises:
        OSError: unreadable, no regular file, above MAX_FILE_BYTES, or changed meanwhile.
    """
    # without O_NONBLOCK a named pipe in the folder would be waited for without end
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise OSError("not a regular file")
        if before.st_size > MAX_FILE_BYTES:
            raise OSError(f"{before.st_size} bytes, more than the limit of {MAX_FILE_BYTES}")
        data = os.read(descriptor, before.st_size + 1)
        while len(data) < before.st_size and (more := os.read(descriptor, before.st_size)):
            data += more
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if (len(data), after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise OSError("it changed while it was read")
    return data
