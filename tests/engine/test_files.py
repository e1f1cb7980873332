"""Atomic writes: the old file or the whole new one, and never a device or a folder in its place."""

import os
from pathlib import Path

import pytest

from observed_disk import ObservedDisk, open_descriptors
from simmim import files


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two ✓")
    assert path.read_text(encoding="utf-8") == "two ✓"
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_a_file_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the renaming after it: else a power cut may leave an empty file under the name."""
    disk = ObservedDisk(monkeypatch, tmp_path)
    before = open_descriptors()
    files.write_text(tmp_path / "a.txt", "text")
    temporary = f".a.txt.tmp-{os.getpid()}"
    assert disk.calls == [f"flush {temporary}", f"rename {temporary} to a.txt", "flush ."]
    assert disk.flushed[temporary] == b"text"
    assert open_descriptors() == before


@pytest.mark.parametrize(("call", "content"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_disk_that_fails_at_any_call_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, content: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    disk = ObservedDisk(monkeypatch, tmp_path)
    disk.fail_at = call
    before = open_descriptors()
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]
    assert open_descriptors() == before


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.write_atomic(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="not a regular file, left alone"):
        files.write_text(tmp_path / "folder", "text")
    assert (tmp_path / "folder").is_dir()
