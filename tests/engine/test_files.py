"""Atomic writes: the old file or the whole new one, and never a device or a folder in its place."""

from pathlib import Path

import pytest

from simmim import files


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two ✓")
    assert path.read_text(encoding="utf-8") == "two ✓"
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


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
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
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
