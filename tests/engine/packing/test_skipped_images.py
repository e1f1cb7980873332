"""Images that are not packed: counted, and named with the reason."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from packed_folders import contents, run, skipped
from simmim.data.open import open_source
from simmim.data.shards import ShardSource


def test_what_is_skipped_and_why(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bad"
    root.mkdir()
    good = min((small / "cat").iterdir()).read_bytes()
    (root / "good.jpg").write_bytes(good)
    (root / "cut.jpg").write_bytes(good[:300])
    (root / "empty.jpg").touch()
    (root / "text\t\x1b[31m\n.jpg").write_text("no image")
    (root / "dead.jpg").symlink_to("nowhere")
    Image.new("L", (400, 300)).save(root / "large.png")
    assert run(root, tmp_path / "packed", "--max-pixels", 100_000) == 0
    reasons = skipped(tmp_path / "packed")
    assert set(reasons) == {
        "cut.jpg", "empty.jpg", r"text\t\x1b[31m\n.jpg", "dead.jpg", "large.png",
    }  # fmt: skip
    assert reasons["large.png"] == "too many pixels: 400×300"
    assert reasons["dead.jpg"] == "not read: No such file or directory"
    assert reasons["empty.jpg"].startswith("unreadable: ")
    assert "1 images in 1 shards" in (out := capsys.readouterr().out)
    assert "skipped 5 (3 unreadable, 1 not read, 1 too many pixels), see skipped.tsv" in out
    assert json.loads((tmp_path / "packed" / "dataset.json").read_text())["skipped"] == 5


def test_a_file_that_changes_while_it_is_packed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "growing"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(min((small / "cat").iterdir()).read_bytes())
    real = os.read

    def grow(descriptor: int, size: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("1.jpg"):
            with (root / "1.jpg").open("ab") as file:
                file.write(b"more")
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", grow)
    assert run(root, tmp_path / "packed", "--workers", 1) == 0
    assert skipped(tmp_path / "packed") == {"1.jpg": "changed: it changed while it was read"}


def test_a_shard_without_images_has_an_index_only(small: Path, tmp_path: Path) -> None:
    """DALI refuses an empty shard."""
    root = tmp_path / "mixed"
    root.mkdir()
    for number in range(6):
        data = min((small / "cat").iterdir()).read_bytes()
        (root / f"{number}.jpg").write_bytes(b"no image" if number in (2, 3) else data)
    folder = tmp_path / "packed"
    assert run(root, folder, "--images-per-shard", 2) == 0
    assert sorted(p.name for p in folder.glob("00*")) == [
        "000000.idx", "000000.json", "000000.tar", "000001.json",
        "000002.idx", "000002.json", "000002.tar",
    ]  # fmt: skip
    source = open_source(str(folder))
    assert isinstance(source, ShardSource)
    assert [path.name for path in source.shards] == ["000000.tar", "000002.tar"]
    assert list(source.names) == [
        "000000.tar/00000000.jpg", "000000.tar/00000001.jpg",
        "000002.tar/00000004.jpg", "000002.tar/00000005.jpg",
    ]  # fmt: skip
    assert source.read(3) == data
    assert run("--verify", folder) == 0
    before = contents(folder)
    assert run(root, folder, "--images-per-shard", 2) == 0
    assert contents(folder) == before


def test_hostile_tar_members_are_counted(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = min((small / "cat").iterdir()).read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE), ("../b.jpg", tarfile.REGTYPE), ("c.jpg", tarfile.SYMTYPE),
            ("d.jpg", tarfile.BLKTYPE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data))
        huge = tarfile.TarInfo("huge.jpg")
        huge.size = 2**50
        archive.fileobj.write(huge.tobuf())  # type: ignore[union-attr]
    assert run(tmp_path / "x.tar", tmp_path / "packed") == 0
    assert skipped(tmp_path / "packed") == {
        "x.tar/../b.jpg": "name that leads out of the folder",
        "x.tar/c.jpg": "link: to /etc/passwd",
        "x.tar/d.jpg": "not a regular file",
        "x.tar/huge.jpg": f"not read: {2**50} bytes, more than the limit of {2**30}",
    }
    assert "1 images" in capsys.readouterr().out


def test_nothing_to_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    assert run(tmp_path / "bad", tmp_path / "packed") == 2
    error = capsys.readouterr().err
    assert "not one image could be packed (1 unreadable)" in error
    assert error.count("\n") == 1
