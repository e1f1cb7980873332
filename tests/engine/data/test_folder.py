"""The images of a folder: links, and a run's own pictures among them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmim.data.folder import FolderSource, SelectedSource
from simmim.data.open import open_source


def test_links(photos: Path, tmp_path: Path) -> None:
    """Linked files and folders are followed, circles are not, and a dead link is one bad image."""
    folder = tmp_path / "links"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "circle").symlink_to(folder)
    (folder / "elsewhere").symlink_to(photos)
    (folder / "dead.jpg").symlink_to("nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    source = open_source(str(folder))
    assert len(source.names) == 2 + len(list(photos.iterdir()))
    for name, reason in (("dead.jpg", "No such file"), ("pipe.jpg", "not a regular file")):
        with pytest.raises(OSError, match=reason):
            source.read(list(source.names).index(name))


def test_a_run_among_the_photos_adds_none(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(min(photos.iterdir()).read_bytes())
    pictures = tmp_path / "runs" / "mine" / "pictures"
    pictures.mkdir(parents=True)
    (pictures / "step_1.png").write_bytes(b"x")
    for name in (".lock", "run.json"):
        (tmp_path / "runs" / "mine" / name).touch()
    assert list(open_source(str(tmp_path)).names) == ["photo.jpg"]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_images_come_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in that of the disk, which another machine does not share."""
    walk = os.walk

    def backwards(*arguments: Any, **named: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, subfolders, files in walk(*arguments, **named):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    write(tmp_path, "b.jpg", "a/c.JPG", "a/b/z.png", "c/a.webp", "a.jpg", "notes.txt")
    names = ["a.jpg", "a/b/z.png", "a/c.JPG", "b.jpg", "c/a.webp"]
    source = FolderSource(tmp_path)
    assert list(source.names) == names
    assert [source.read(index) for index in range(5)] == [name.encode() for name in names]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", ".trash/b.jpg", "c/.d.jpg", "c/.e/f.jpg", "c/g.jpg")
    assert list(FolderSource(tmp_path).names) == ["a.jpg", "c/g.jpg"]


def test_arrays_are_images_only_where_there_are_no_others(tmp_path: Path) -> None:
    write(tmp_path, "b/2.npy", "1.npy")
    assert list(FolderSource(tmp_path).names) == ["1.npy", "b/2.npy"]
    write(tmp_path, "photo.jpg")
    assert list(FolderSource(tmp_path).names) == ["photo.jpg"]


def test_selected_images_have_the_order_of_the_selection(tmp_path: Path) -> None:
    source = FolderSource(write(tmp_path, "0.jpg", "1.jpg", "2.jpg", "3.jpg"))
    some = SelectedSource(source, np.array([3, 1]))
    assert list(some.names) == ["3.jpg", "1.jpg"]
    assert [some.read(index) for index in range(2)] == [b"3.jpg", b"1.jpg"]
