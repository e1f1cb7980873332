"""What is flushed to the disk and renamed, in order; and a disk that fails at one such call."""

import os
from pathlib import Path
from typing import Any

import pytest


class ObservedDisk:
    """Records the calls that make files safe; paths are relative to a folder.

    Args:
        patch: puts itself in place of `os.fsync` and `os.replace`.
        root: the folder.

    Attributes:
        calls: such as "flush a.txt" and "rename a.txt to b.txt".
        flushed: path → its content when it was flushed last.
        fail_at: number of the call that fails instead, for lack of space; None fails none.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root.resolve()
        self.fail_at: int | None = None
        self.calls: list[str] = []
        self.flushed: dict[str, bytes] = {}
        self._fsync, self._replace = os.fsync, os.replace
        patch.setattr(os, "fsync", self._flush)
        patch.setattr(os, "replace", self._rename)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if len(self.calls) - 1 == self.fail_at:
            raise OSError(28, "No space left on device")

    def _flush(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        name = path.relative_to(self.root).as_posix()
        self._note(f"flush {name}")
        self.flushed[name] = path.read_bytes() if path.is_file() else b""
        self._fsync(descriptor)

    def _rename(self, old: Any, new: Any) -> None:
        names = [Path(path).resolve().relative_to(self.root) for path in (old, new)]
        self._note(f"rename {names[0]} to {names[1]}")
        self._replace(old, new)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
