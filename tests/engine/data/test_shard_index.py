"""The files of a packed folder: read as they were written; indices that lie are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmim.data.labels import MAX_CLASSES
from simmim.data.open import open_source
from simmim.data.shard_index import (
    MAX_SHARD_BYTES,
    ShardIndex,
    is_pack,
    read_dataset,
    read_index,
    shard_name,
)
from simmim.errors import DataError

DATASET: dict[str, Any] = {
    "format": "simmim-pack", "version": 1, "shards": 2, "images": 5, "classes": ["a", "b"],
    "channels": 3, "options": {}, "plan": "x",
}  # fmt: skip


def index_of_two(**changed: Any) -> ShardIndex:
    return ShardIndex(
        **{
            "name": ["a.jpg", "b.jpg"],
            "offset": [512, 1536],
            "size": [100, 464],
            "sha256": ["x", "y"],
            "source": ["one", "two"],
            "width": [30, 31],
            "height": [40, 41],
            "channels": [3, 3],
            "label": [-1, MAX_CLASSES - 1],
            "shard_bytes": 2000,
            "source_bytes": 3000,
            "skipped": [("three", "too large")],
        }
        | changed
    )


def written(folder: Path, index: ShardIndex, shard_bytes: int = 2000) -> Path:
    shard = folder / "000000.tar"
    shard.write_bytes(bytes(shard_bytes))
    shard.with_suffix(".json").write_text(index.to_json())
    return shard


def test_names_of_shards_have_six_digits_or_more() -> None:
    assert [shard_name(number) for number in (0, 123, 1234567)] == ["000000", "000123", "1234567"]


@pytest.mark.parametrize(
    ("text", "beside", "packed"),
    [
        (json.dumps(DATASET), "", True),
        ('{"format": "simmim-pack"}', "", True),  # damaged, but one
        ('{"format": "other"}', "000000.json", False),
        ("{", "000000.json", True),
        ("[]", "000000.json", True),
        ("{}", "000000.json", True),
        ("{", "", False),
        ("{", "000001.json", False),
        (None, "000000.json", False),
    ],
)
def test_a_packed_folder_is_known_by_its_dataset_json(
    tmp_path: Path, text: str | None, beside: str, packed: bool
) -> None:
    if beside:
        (tmp_path / beside).write_text("{}")
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    assert is_pack(tmp_path) is packed


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", None), ("classes", None), ("channels", None), ("shards", 0), ("images", 2**40 - 1)],
)
def test_a_dataset_json_is_read_as_it_is(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET | {name: value}))
    assert read_dataset(tmp_path) == DATASET | {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shards", -1), ("shards", 1.0), ("shards", True), ("shards", None), ("shards", 2**40),
        ("images", -1), ("images", "5"), ("images", []), ("classes", "ab"), ("classes", ["a", 1]),
        ("channels", -1), ("channels", "3"), ("options", []), ("plan", None),
    ],
)  # fmt: skip
def test_a_dataset_json_that_lies_is_one_line(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET | {name: value}))
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path)
    path = tmp_path / "dataset.json"
    assert str(caught.value) == f"{path}: damaged: {name} is {value}"


def test_a_dataset_json_says_how_many_images_it_has(tmp_path: Path) -> None:
    """An unfinished one has null there."""
    left = {name: value for name, value in DATASET.items() if name != "images"}
    (tmp_path / "dataset.json").write_text(json.dumps(left))
    with pytest.raises(DataError, match="damaged: images is None"):
        read_dataset(tmp_path)


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    for index in (index_of_two(), index_of_two(label=None, skipped=[])):
        assert read_index(written(tmp_path, index)) == index


def test_an_index_is_columns_of_numbers() -> None:
    contents = index_of_two().contents()
    assert contents.names == ["a.jpg", "b.jpg"]
    assert contents.places.tolist() == [[512, 100], [1536, 464]]
    assert contents.labels.tolist() == [-1, MAX_CLASSES - 1]
    assert contents.sizes is not None
    assert contents.sizes.tolist() == [[30, 40], [31, 41]]
    types = contents.places.dtype, contents.labels.dtype, contents.sizes.dtype
    assert types == (np.int64, np.int64, np.int32)
    assert index_of_two(label=None).contents().labels.tolist() == [-1, -1]
    nothing = ShardIndex().contents()
    assert nothing.sizes is not None
    assert (nothing.places.shape, nothing.labels.shape, nothing.sizes.shape) == (
        (0, 2), (0,), (0, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offset": [511, 1536]}, "offset from 511 to 1536, possible are 512 to 2000"),
        ({"offset": [512, 1537]}, "an image ends behind the 2000 bytes"),
        ({"size": [2001, 464]}, "size from 464 to 2001, possible are 0 to 2000"),
        ({"width": [0, 31]}, "width from 0"),
        ({"height": [40, 2**31]}, f"height from 40 to {2**31}"),
        ({"channels": [0, 3]}, "channels from 0"),
        ({"label": [-2, 0]}, "label from -2"),
        ({"label": [0, MAX_CLASSES]}, f"label from 0 to {MAX_CLASSES}"),
        ({"label": [0]}, "label is no list of 2 integers"),
        ({"source": ["one"]}, "source is no list of 2 strings"),
        ({"source_bytes": -1}, "source_bytes or skipped"),
        ({"skipped": [("a", 1)]}, "source_bytes or skipped"),
        ({"skipped": [("a", "b", "c")]}, "source_bytes or skipped"),
        ({"shard_bytes": MAX_SHARD_BYTES}, f"shard_bytes is {MAX_SHARD_BYTES}"),
        ({"shard_bytes": -1}, "shard_bytes is -1"),
    ],
)
def test_bounds_of_an_index(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    shard = written(tmp_path, index_of_two(**changed))
    with pytest.raises(DataError, match=message):
        read_index(shard)


def test_a_shard_has_the_bytes_that_were_packed(tmp_path: Path) -> None:
    """One that was cut off can be read in part, one that grew is another file."""
    index = index_of_two()
    for whole in (True, False):
        with pytest.raises(DataError, match="has 2001 bytes, 2000 were packed"):
            read_index(written(tmp_path, index, 2001), whole=whole)
    with pytest.raises(DataError, match="has 1999 bytes, 2000 were packed"):
        read_index(written(tmp_path, index, 1999))
    assert read_index(written(tmp_path, index, 1999), whole=False) == index


def test_a_shard_without_images_need_not_be_there(tmp_path: Path) -> None:
    index = ShardIndex(source_bytes=7, skipped=[("a", "empty")])
    written(tmp_path, index).unlink()
    assert read_index(tmp_path / "000000.tar") == index


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


def test_a_folder_with_another_dataset_json_is_a_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"format": "something else"}')
    (tmp_path / "a.jpg").write_bytes(min(photos.iterdir()).read_bytes())
    assert list(open_source(str(tmp_path)).names) == ["a.jpg"]
