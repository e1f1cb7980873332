"""Tar shards from outside: hostile members, labels beside images, indices that lie."""

import hashlib
import io
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from simmim.data.open import open_source
from simmim.data.shard_index import read_index
from simmim.data.shards import ShardSource, cache_folder, scan_tar
from simmim.errors import DataError


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


def change(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_packed_folders_images_are_those_of_all_its_shards_in_order(packed: Path) -> None:
    source = open_source(str(packed))
    assert isinstance(source, ShardSource)
    assert source.sizes is not None
    indices = [read_index(packed / f"{number:06d}.tar") for number in range(3)]
    names = [
        f"{number:06d}.tar/{name}" for number, index in enumerate(indices) for name in index.name
    ]
    assert list(source.names) == names
    assert source.shards == [packed / f"{number:06d}.tar" for number in range(3)]
    widths = [width for index in indices for width in index.width]
    heights = [height for index in indices for height in index.height]
    assert source.sizes.tolist() == [list(size) for size in zip(widths, heights)]
    sums = [sha256 for index in indices for sha256 in index.sha256]
    assert [hashlib.sha256(source.read(i)).hexdigest() for i in range(len(names))] == sums


def test_a_shard_without_images_is_left_out(packed: Path) -> None:
    count = len(read_index(packed / "000001.tar").name)
    total = json.loads((packed / "dataset.json").read_text())["images"]
    columns = ("name", "offset", "size", "sha256", "source", "width", "height", "channels")
    change(packed / "000001.json", **{column: [] for column in columns})
    (packed / "000001.tar").unlink()
    change(packed / "dataset.json", images=total - count)
    source = open_source(str(packed))
    assert isinstance(source, ShardSource)
    assert source.shards == [packed / "000000.tar", packed / "000002.tar"]
    last = read_index(packed / "000002.tar")
    assert hashlib.sha256(source.read(len(source.names) - 1)).hexdigest() == last.sha256[-1]


@pytest.mark.parametrize(
    ("classes", "names"), [(None, ("0", "1", "2")), (list("xyzt"), tuple("xyzt"))]
)
def test_a_packed_folders_labels_have_its_classes(
    packed: Path, classes: list[str] | None, names: tuple[str, ...]
) -> None:
    count = len(read_index(packed / "000001.tar").name)
    change(packed / "000001.json", label=[2] + [-1] * (count - 1))
    change(packed / "dataset.json", classes=classes)
    source = open_source(str(packed))
    assert isinstance(source, ShardSource)
    assert source.labels is not None
    assert source.labels.classes == names
    first = len(read_index(packed / "000000.tar").name)
    assert np.flatnonzero(source.labels.values == 2).tolist() == [first]
    assert (source.labels.values == -1).sum() == len(source.names) - 1


def test_a_pack_that_is_not_finished_or_lacks_images_is_refused(packed: Path) -> None:
    dataset = packed / "dataset.json"
    images = json.loads(dataset.read_text())["images"]
    change(dataset, images=images + 1)
    said = (
        f"{dataset}: says {images + 1} images, the shards' indices {images}; simmim pack --verify"
    )
    with pytest.raises(DataError, match=re.escape(said)):
        open_source(str(packed))
    change(dataset, images=None)
    with pytest.raises(DataError, match=rf"{packed}: a pack that is not finished"):
        open_source(str(packed))


def test_the_cache_is_asked_for_this_shard_as_it_is_now(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    for name in ("a.jpg", "b.jpg"):
        with tarfile.open(shard, "w") as archive:
            add(archive, name, b"x")
        os.utime(shard, ns=(10**18, 10**18 + ord(name[0])))  # the same size at another time
        assert scan_tar(shard).names == [name]
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        add(archive, "c.jpg", b"x")
    os.utime(tmp_path / "y.tar", ns=(10**18, 10**18 + ord("b")))
    assert scan_tar(tmp_path / "y.tar").names == ["c.jpg"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"images": 7, "skipped": []}', '{"images": [["a.jpg"]]}']
)
def test_a_damaged_cache_is_written_anew(tmp_path: Path, text: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.jpg", b"xyz")
    scan_tar(tmp_path / "x.tar")
    (cache,) = cache_folder().iterdir()
    whole = cache.read_text()
    assert json.loads(whole) == {"images": [["a.jpg", 512, 3, -1]], "skipped": []}
    cache.write_text(text)
    assert scan_tar(tmp_path / "x.tar").names == ["a.jpg"]
    assert cache.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.jpg", b"xyz")
    for _ in range(2):
        assert scan_tar(tmp_path / "x.tar").names == ["a.jpg"]


def test_a_cut_off_shard_is_not_cached(tmp_path: Path) -> None:
    """It may be on its way here, with the size and date that it will have."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.jpg", bytes(5000))
    os.truncate(tmp_path / "x.tar", 2000)
    assert scan_tar(tmp_path / "x.tar").names == ["a.jpg"]
    assert not cache_folder().exists()


def test_the_cache_lies_in_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/simmim/tar-index")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/simmim/tar-index")


def test_an_image_above_the_limit_of_bytes_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.jpg", bytes(700))
    source = ShardSource([tmp_path / "x.tar"])
    monkeypatch.setattr("simmim.data.shards.MAX_FILE_BYTES", 700)
    assert source.read(0) == bytes(700)
    monkeypatch.setattr("simmim.data.shards.MAX_FILE_BYTES", 699)
    with pytest.raises(OSError, match="700 bytes, more than the limit of 699"):
        source.read(0)


def test_the_shard_read_longest_ago_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simmim.data.shards.MAX_OPEN_SHARDS", 2)
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            add(archive, "a.jpg", b"x")
    source = ShardSource([tmp_path / f"{number}.tar" for number in range(3)])
    for index in (0, 1, 0, 2):
        source.read(index)
    assert [shard for _, shard in source._files] == [0, 2]
