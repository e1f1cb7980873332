"""Shards that tar, webdataset and DALI read."""

import hashlib
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packed_folders import run
from simmim.data.decode import decode
from simmim.data.open import open_source
from simmim.data.shard_index import ShardIndex
from simmim.data.shards import ShardSource
from simmim.packing.members import check_members, dali_index, write_member


def test_read_by_tar_and_by_a_plain_scan(small: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "packed", tmp_path / "out"
    out.mkdir()
    assert run(small, folder) == 0
    subprocess.run(["tar", "-xf", folder / "000000.tar", "-C", out], check=True)
    source = ShardSource([folder / "000000.tar"])
    assert len(source.names) == 14
    for number, name in enumerate(source.names):
        path = out / name.split("/")[1]
        assert path.read_bytes() == source.read(number)
        assert path.with_suffix(".cls").read_text() == str(int(number >= 7))
    assert source.labels is not None
    assert source.labels.values.tolist() == [0] * 7 + [1] * 7


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_read_by_webdataset(small: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    assert run(small, tmp_path / "packed", "--images-per-shard", 5) == 0
    source = open_source(str(tmp_path / "packed"))
    urls = sorted(str(p) for p in (tmp_path / "packed").glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("jpg", "cls"))
    assert [label for _, label in samples] == [0] * 7 + [1] * 7
    raw = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["jpg"] for sample in raw] == [source.read(i) for i in range(14)]


def test_read_by_dali(small: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    folder = tmp_path / "packed"
    assert run(small, folder, "--images-per-shard", 5) == 0
    source = open_source(str(folder))

    @dali.pipeline_def(batch_size=14, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        jpeg, label = dali.fn.readers.webdataset(
            paths=sorted(str(p) for p in folder.glob("*.tar")),
            index_paths=sorted(str(p) for p in folder.glob("*.idx")),
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        return jpeg, label, dali.fn.decoders.image(jpeg, device="cpu")

    built = pipeline()
    built.build()
    jpeg, label, pixels = built.run()
    for number in range(14):
        assert bytes(jpeg.at(number)) == source.read(number)
        assert bytes(label.at(number)) == str(int(number >= 7)).encode()
        expected = decode(source.read(number), 3).astype(int)
        assert np.abs(pixels.at(number).astype(int) - expected).mean() < 1


def test_the_index_is_that_of_dalis_own_tool(small: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    assert run(small, tmp_path / "packed") == 0
    with wds2idx.IndexCreator(
        str(tmp_path / "packed" / "000000.tar"), str(tmp_path / "theirs"), verbose=False
    ) as creator:
        creator.create_index()
    assert (tmp_path / "packed" / "000000.idx").read_text() == (tmp_path / "theirs").read_text()


def shard_of(path: Path, labels: list[int] | None) -> ShardIndex:
    """Two members of 5 and 600 bytes, with the labels that are not -1."""
    index = ShardIndex(label=labels)
    with path.open("wb") as file:
        for number, size in enumerate((5, 600)):
            data = bytes([65 + number]) * size
            index.name.append(f"{number:08d}.jpg")
            index.offset.append(write_member(file, index.name[-1], data))
            index.size.append(size)
            index.sha256.append(hashlib.sha256(data).hexdigest())
            if labels is not None and labels[number] >= 0:
                write_member(file, f"{number:08d}.cls", str(labels[number]).encode())
        file.write(bytes(1024))
    return index


def test_members_are_those_of_tar_without_date_and_owner(tmp_path: Path) -> None:
    index = shard_of(tmp_path / "x.tar", [0, 12])
    with tarfile.open(tmp_path / "x.tar", "r:") as archive:
        members = archive.getmembers()
        contents = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert contents == {
        "00000000.jpg": b"A" * 5,
        "00000000.cls": b"0",
        "00000001.jpg": b"B" * 600,
        "00000001.cls": b"12",
    }
    assert {(m.mode, m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0o644, 0, 0, 0, "")}
    assert index.offset == [members[0].offset_data, members[2].offset_data] == [512, 2560]


@pytest.mark.parametrize(
    ("labels", "lines"),
    [
        ([0, 12], ["jpg 512 5 00000000.jpg cls 1536 1 00000000.cls",
                   "jpg 2560 600 00000001.jpg cls 4096 2 00000001.cls"]),
        ([-1, 3], ["jpg 512 5 00000000.jpg", "jpg 1536 600 00000001.jpg cls 3072 1 00000001.cls"]),
        (None, ["jpg 512 5 00000000.jpg", "jpg 1536 600 00000001.jpg"]),
    ],
)  # fmt: skip
def test_dalis_index_says_where_images_and_labels_begin(
    tmp_path: Path, labels: list[int] | None, lines: list[str]
) -> None:
    index = shard_of(tmp_path / "x.tar", labels)
    assert dali_index(index).splitlines() == ["v1.2 2", *lines]
    assert check_members(tmp_path / "x.tar", index) == []


def damaged(path: Path, at: int, byte: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(byte)


def test_every_difference_between_members_and_index_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"

    def told(**changes: object) -> list[str]:
        return check_members(path, replace(shard_of(path, [0, 12]), **changes))  # type: ignore[arg-type]

    index = shard_of(path, [0, 12])
    assert told(label=[0, 13]) == ["00000001.jpg: its label is not 13"]
    assert told(label=[0, -1]) == ["00000001.cls: not in the index"]
    assert told(label=None) == ["00000000.cls: not in the index", "00000001.cls: not in the index"]
    assert told(offset=[512, 2048])[0] == "00000001.jpg: is at (2560, 600)"
    assert told(size=[5, 599])[0] == "00000001.jpg: is at (2560, 600)"
    assert told(name=["00000000.jpg", "9.jpg"]) == [
        "9.jpg: missing",
        "9.jpg: its label is not 12",
        "00000001.jpg: not in the index",
        "00000001.cls: not in the index",
    ]
    assert told(sha256=[index.sha256[0]] * 2) == [
        "00000001.jpg: damaged, its bytes have another sha256"
    ]
    damaged(path, 512 + 4, b"x")
    assert check_members(path, index) == ["00000000.jpg: damaged, its bytes have another sha256"]
    index = shard_of(path, [0, 12])
    damaged(path, 1536, b"1")
    assert check_members(path, index) == ["00000000.jpg: its label is not 0"]
    shard_of(path, [0, 12])
    damaged(path, 2048 + 100, b"x")  # within a header
    assert check_members(path, index)[0] == "00000001.jpg: missing"
    shard_of(path, [0, 12])
    os.truncate(path, 2560 + 100)
    assert "not a whole tar file" in check_members(path, index)[0]
