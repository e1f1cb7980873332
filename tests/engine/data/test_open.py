"""What a path means, and what is said of one that means no images."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from simmim.data.folder import FolderSource
from simmim.data.open import open_source
from simmim.data.shards import ShardSource
from simmim.errors import DataError, PathError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def write_shard(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.jpg").write_text("x")
    with pytest.raises(DataError, match=f"{tmp_path}: no image"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(str(tmp_path / "missing"))


def test_a_path_may_begin_at_home(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    assert list(open_source("~/photos").names) == ["a.jpg"]


def test_shards_of_a_folder_come_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in that of the disk, which another machine does not share."""
    for number in (1, 0):
        write_shard(tmp_path / "shards" / f"{number}.tar", "a.jpg", "b.jpg")
    write_shard(tmp_path / "shards" / "below" / "2.tar", "c.jpg")
    (tmp_path / "shards" / "folder.tar").mkdir()
    glob = Path.rglob

    def backwards(folder: Path, pattern: str) -> Iterator[Path]:
        return iter(sorted(glob(folder, pattern), reverse=True))

    monkeypatch.setattr(Path, "rglob", backwards)
    names = ["0.tar/a.jpg", "0.tar/b.jpg", "1.tar/a.jpg", "1.tar/b.jpg", "2.tar/c.jpg"]
    source = open_source(str(tmp_path / "shards"))
    assert isinstance(source, ShardSource)
    assert list(source.names) == names
    (alone,) = open_source(str(tmp_path / "shards" / "below" / "2.tar")).names
    assert alone == "2.tar/c.jpg"


def test_images_go_before_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "both" / "0.tar", "b.jpg")
    (tmp_path / "both" / "a.jpg").write_text("x")
    source = open_source(str(tmp_path / "both"))
    assert isinstance(source, FolderSource)
    assert list(source.names) == ["a.jpg"]


@pytest.mark.parametrize("path", ["data", "data/below", "data/below/0.parquet"])
def test_parquet_is_to_be_packed(tmp_path: Path, path: str) -> None:
    (tmp_path / "data" / "below").mkdir(parents=True)
    (tmp_path / "data" / "below" / "0.parquet").write_text("x")
    told = f"{tmp_path / path}: parquet has no random access; `simmim pack {tmp_path / path} "
    with pytest.raises(PathError, match=told):
        open_source(str(tmp_path / path))


def test_shards_without_images_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards" / "0.tar", "notes.txt")
    with pytest.raises(PathError, match=r"shards: no image and no \.tar shard of images in it \("):
        open_source(str(tmp_path / "shards"))
