"""The images of a folder: links, and a run's own pictures among them."""

import os
from pathlib import Path

import pytest

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
