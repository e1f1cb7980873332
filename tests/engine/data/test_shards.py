"""Tar shards from outside: hostile members, labels beside images, indices that lie."""

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from simmim.data.open import open_source
from simmim.data.shard_index import read_index
from simmim.data.shards import ShardSource, scan_tar
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.pack import pack


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def jpeg(write_image: Callable[..., Path], tmp_path: Path) -> bytes:
    path = write_image("fixture.jpg", size=(40, 30))
    data = path.read_bytes()
    path.unlink()
    return data


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **header: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def test_hostile_members_are_named_and_never_followed(tmp_path: Path, jpeg: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "good.jpg", jpeg)
        add(archive, "/etc/absolute.jpg", jpeg)
        add(archive, "deep/../../up.jpg", jpeg)
        add(archive, "soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/pass\nwd")
        add(archive, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(archive, "device.jpg", type=tarfile.CHRTYPE, devmajor=1)
        add(archive, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(archive, "folder.jpg", type=tarfile.DIRTYPE)
        add(archive, "sparse.jpg", type=tarfile.GNUTYPE_SPARSE)
        add(archive, "last.jpg", jpeg)
    expected = {
        "/etc/absolute.jpg": "name that leads out of the folder",
        "deep/../../up.jpg": "name that leads out of the folder",
        "soft.jpg": r"link: to /etc/pass\nwd",
        "hard.jpg": "link: to good.jpg",
        "device.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
        "sparse.jpg": "sparse member",
    }
    for _ in range(2):  # the second time from the cache
        source = ShardSource([tmp_path / "x.tar"])
        assert list(source.names) == ["x.tar/good.jpg", "x.tar/last.jpg"]
        assert [source.read(i) for i in range(2)] == [jpeg, jpeg]
        assert dict(source.skipped) == {f"x.tar/{name}": why for name, why in expected.items()}


@pytest.mark.parametrize("size", [2**40, 2**62, 2**80])
def test_a_size_beyond_the_end_is_neither_allocated_nor_believed(
    tmp_path: Path, jpeg: bytes, size: int
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "good.jpg", jpeg)
        header = tarfile.TarInfo("huge.jpg")
        header.size = size
        archive.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
        archive.offset = archive.fileobj.tell()
        add(archive, "hidden.jpg", jpeg)
    source = ShardSource([tmp_path / "x.tar"])
    assert list(source.names) == ["x.tar/good.jpg", "x.tar/huge.jpg"]
    assert source.read(0) == jpeg
    with pytest.raises(OSError, match="more than the limit"):
        source.read(1)


def test_negative_sizes_and_giant_headers_end_the_scan(tmp_path: Path, jpeg: bytes) -> None:
    """tarfile would go round and round, or read the whole of a long name into memory."""
    for case, kind, size in (("negative", b"0", -512), ("long", tarfile.GNUTYPE_LONGNAME, 2**30)):
        shard = tmp_path / f"{case}.tar"
        with tarfile.open(shard, "w") as archive:
            add(archive, "good.jpg", jpeg)
            header = bytearray(tarfile.TarInfo("bad.jpg").tobuf(tarfile.GNU_FORMAT))
            header[156:157] = kind
            header[124:136] = (
                b"\xff" * 4 + struct.pack(">q", size)
                if size < 0
                else (f"{size:011o}".encode() + b"\0")
            )
            header[148:156] = b"        "
            header[148:156] = f"{sum(header):06o}\0 ".encode()
            archive.fileobj.write(header)
            archive.offset = archive.fileobj.tell()
        found = scan_tar(shard)
        assert found.names == ["good.jpg"]
        assert found.skipped[0][1].startswith(f"cut off: a {'member' if size < 0 else 'header'}")


def test_a_damaged_header_in_the_middle_is_told(tmp_path: Path, jpeg: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            add(archive, name, jpeg)
    offset = int(scan_tar(tmp_path / "x.tar").places[1, 0]) - tarfile.BLOCKSIZE
    with (tmp_path / "x.tar").open("r+b") as file:
        file.seek(offset + 148)
        file.write(b"000000")
    source = ShardSource([tmp_path / "x.tar"])
    assert list(source.names) == ["x.tar/a.jpg"]
    assert source.skipped == [
        ("x.tar/", f"damaged header: at byte {offset}; what follows it is not read")
    ]


def test_labels_beside_images(tmp_path: Path, jpeg: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "d/a.jpg", jpeg)
        add(archive, "d/a.cls", b"3\n")
        add(archive, "b.cls", b"0")
        add(archive, "b.seg.png", jpeg)
        add(archive, "c.jpg", jpeg)
        add(archive, "d.jpg", jpeg)
        add(archive, "d.cls", b"9" * 30)  # no class number
        add(archive, "e.jpg", jpeg)
        add(archive, "e.cls", b"dog")
    for _ in range(2):
        labels = ShardSource([tmp_path / "0.tar"]).labels
        assert labels is not None
        assert labels.values.tolist() == [3, 0, -1, -1, -1]
        assert labels.classes == ("0", "1", "2", "3")
    with tarfile.open(tmp_path / "1.tar", "w") as archive:
        add(archive, "a.jpg", jpeg)
    assert ShardSource([tmp_path / "1.tar"]).labels is None


def test_arrays_are_images_where_there_are_no_others(tmp_path: Path, jpeg: bytes) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((4, 5, 6), dtype=np.uint8))
    for name, members in (("arrays", {"a.npy"}), ("both", {"a.npy", "b.jpg"})):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for member in sorted(members):
                add(archive, member, array.getvalue() if member.endswith("npy") else jpeg)
    assert list(ShardSource([tmp_path / "arrays.tar"]).names) == ["arrays.tar/a.npy"]
    assert list(ShardSource([tmp_path / "both.tar"]).names) == ["both.tar/b.jpg"]


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    pack(open_source(str(photos)), folder, Options(short_side=32, images_per_shard=10))
    return folder


def test_a_packed_folder_is_opened_without_its_shards(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tar was opened")

    monkeypatch.setattr(tarfile, "open", refuse)
    source = open_source(str(packed))
    assert isinstance(source, ShardSource)
    assert source.sizes is not None
    assert source.sizes.dtype == np.int32
    assert source.sizes.shape == (len(source.names), 2)
    assert source.sizes.min() == 32
    assert source.names[0] == "000000.tar/00000000.jpg"
    assert source.labels is None


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("offset", 0, -5, "offset from -5"),
        ("offset", 1, 10**12, "offset from 512 to 1000000000000"),
        ("offset", 0, 2**70, "offset"),
        ("offset", 0, True, "no list of 10 integers"),
        ("size", 9, 10**6, "ends behind|size from"),
        ("size", 0, -1, "size from -1"),
        ("size", 0, 1.5, "no list of 10 integers"),
        ("width", 3, 0, "width from 0"),
        ("height", 3, 2**31, "height from"),
        ("name", 0, 7, "no list of 10 strings"),
        ("name", None, {"a": 1}, "name is no list"),
        ("sha256", None, ["x"], "sha256 is no list of 10 strings"),
        ("label", None, [2**40] * 10, "label from"),
        ("skipped", None, [["a"]], "skipped"),
        ("shard_bytes", None, 2**60, "shard_bytes is"),
        ("shard_bytes", None, "x", "shard_bytes is x"),
        ("version", None, 9, "version 9, this simmim reads 1"),
        ("format", None, "other", "no index of simmim pack"),
    ],
)
def test_an_index_that_lies_is_one_line(
    packed: Path, column: str, row: int | None, value: object, message: str
) -> None:
    path = packed / "000001.json"
    index = json.loads(path.read_text())
    if row is None:
        index[column] = value
    else:
        index[column][row] = value
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(packed))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"format": "simmim-pack"}', "\xff"]
)
def test_damaged_json_is_one_line(packed: Path, text: str) -> None:
    for name in ("000000.json", "dataset.json"):
        (packed / name).write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=str(packed / name)):
            open_source(str(packed))


def test_missing_pieces_are_one_line(packed: Path) -> None:
    shard = packed / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"more")
    with pytest.raises(DataError, match=rf"000001\.tar: has {len(whole) + 4} bytes"):
        open_source(str(packed))
    shard.unlink()
    with pytest.raises(DataError, match=r"000001\.tar: No such file"):
        open_source(str(packed))
    shard.write_bytes(whole)
    (packed / "000001.json").unlink()
    with pytest.raises(DataError, match=r"000001\.json: No such file"):
        open_source(str(packed))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_shard_that_is_cut_off_costs_its_own_images_only(packed: Path, when: str) -> None:
    """Whether it is cut off before a run starts or under its hands."""
    shard = packed / "000001.tar"
    every = open_source(str(packed))
    expected = [every.read(index) for index in range(len(every.names))]
    source = every
    if when == "before":
        os.truncate(shard, shard.stat().st_size // 2)
        source = open_source(str(packed))
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    end = shard.stat().st_size
    lost = 0
    for index, (_, offset, size) in enumerate(every._places.tolist()):
        if every.names[index].startswith("000001.tar/") and offset + size > end:
            lost += 1
            with pytest.raises(OSError, match="the shard ends inside this image"):
                source.read(index)
        else:
            assert source.read(index) == expected[index]
    assert 1 <= lost < 10
    with pytest.raises(DataError, match=rf"000001\.tar: has {end} bytes"):
        read_index(shard)  # as --verify does


def test_a_folder_with_another_dataset_json_is_a_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"format": "something else"}')
    (tmp_path / "a.jpg").write_bytes(min(photos.iterdir()).read_bytes())
    assert list(open_source(str(tmp_path)).names) == ["a.jpg"]


def test_tar_shards_hold_the_same_bytes(photos: Path, shards: Path) -> None:
    source = open_source(str(shards))
    assert len(source.names) == len(list(photos.iterdir()))
    for index, name in enumerate(source.names):
        assert source.read(index) == (photos / name.split("/", 1)[1]).read_bytes()
    again = open_source(str(shards))  # from the cached index
    assert list(again.names) == list(source.names)
    assert again.read(3) == source.read(3)


def test_a_changed_shard_is_indexed_anew(photos: Path, shards: Path) -> None:
    before = len(open_source(str(shards / "0.tar")).names)
    with tarfile.open(shards / "0.tar", "a") as archive:
        archive.add(min(photos.iterdir()), "extra.jpg")
    assert len(open_source(str(shards / "0.tar")).names) == before + 1


def test_wrong_shards(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(DataError, match=r"text\.tar: not a readable tar file"):
        open_source(str(tmp_path / "text.tar"))
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(min(photos.iterdir()), "a.jpg")
    with pytest.raises(DataError, match="compressed shards have no random access"):
        open_source(str(tmp_path / "packed.tar"))


def test_a_truncated_shard_is_an_unreadable_image(shards: Path) -> None:
    source = ShardSource([shards / "0.tar"])
    os.truncate(shards / "0.tar", (shards / "0.tar").stat().st_size // 2)
    with pytest.raises(OSError, match="the shard ends inside this image"):
        [source.read(index) for index in range(len(source.names))]


def test_a_shard_cut_off_before_it_was_indexed(shards: Path) -> None:
    whole = len(open_source(str(shards / "0.tar")).names)
    os.truncate(shards / "0.tar", (shards / "0.tar").stat().st_size // 2)
    source = open_source(str(shards / "0.tar"))
    assert 0 < len(source.names) < whole
    assert source.read(0)
    with pytest.raises(OSError, match="the shard ends inside this image"):
        source.read(len(source.names) - 1)


def test_more_shards_than_descriptors(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simmim.data.shards.MAX_OPEN_SHARDS", 2)
    for number, path in enumerate(sorted(photos.iterdir())[:5]):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            archive.add(path, path.name)
    source = open_source(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for index in [0, 1, 2, 3, 4, 0, 3, 1]:
        expected = photos / source.names[index].split("/", 1)[1]
        assert source.read(index) == expected.read_bytes()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_threads_share_few_descriptors(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread's shard is closed for another's while it is read: no bytes of another file."""
    monkeypatch.setattr("simmim.data.shards.MAX_OPEN_SHARDS", 2)
    for number in range(8):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            member = tarfile.TarInfo("a.jpg")
            member.size = 200_000
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
    source = open_source(str(tmp_path))

    def read(number: int) -> bool:
        return source.read(number % 8) == bytes([number % 8]) * 200_000

    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(4000)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
