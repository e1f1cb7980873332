"""Images in parquet files, packed."""

import json
import sys
from pathlib import Path

import pytest

from packed_folders import run, skipped
from simmim.data.folder import FolderSource
from simmim.data.labels import labels_of
from simmim.data.open import open_source
from simmim.errors import DataError
from simmim.packing import parquet


@pytest.fixture
def tables(small: Path, tmp_path: Path) -> Path:
    """Two parquet files as Hugging Face writes them: 14 rows in groups of 5, one without bytes."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    before = FolderSource(small)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
    root = tmp_path / "tables"
    root.mkdir()
    for number, rows in enumerate((range(8), range(8, 14))):
        images = [{"bytes": before.read(i), "path": before.names[i]} for i in rows]
        if number == 1:
            images.append({"bytes": None, "path": "elsewhere.jpg"})
        labels = [int(i >= 7) for i in rows] + [None] * number
        table = pa.table([pa.array(images, kind), pa.array(labels, pa.int64())], schema=schema)
        pq.write_table(table, root / f"train-{number:05d}-of-00002.parquet", row_group_size=5)
    return root


def test_parquet(
    small: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--keep-originals", "--images-per-shard", 4)
    before = FolderSource(small)
    sources = {"a": str(tables), "b": f"{tables}/train-*.parquet"}
    for name, path in sources.items():
        assert run(path, tmp_path / name, *options, "--workers", 2) == 0
        source = open_source(str(tmp_path / name))
        assert [source.read(i) for i in range(14)] == [before.read(i) for i in range(14)]
        labels = labels_of(source)
        assert labels is not None
        assert labels.classes == ("cat", "dog")
        assert labels.values.tolist() == [0] * 7 + [1] * 7
        assert skipped(tmp_path / name) == {
            "train-00001-of-00002.parquet/6": "not read: the row has no image bytes"
        }
    assert run(tables / "train-00000-of-00002.parquet", tmp_path / "one", *options) == 0
    assert len(open_source(str(tmp_path / "one")).names) == 8
    capsys.readouterr()
    assert run(tables, tmp_path / "no", "--shuffle", 1) == 2
    assert "parquet has no random access" in capsys.readouterr().err
    with pytest.raises(DataError, match=f"simmim pack {tables} FOLDER"):
        open_source(str(tables))
    (tables / "test-00000-of-00001.parquet").write_bytes(b"")
    assert run(tables, tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "holds the splits test, train; choose one" in error
    assert f"'{tables}/train-*.parquet'" in error
    assert run(tables / "test-00000-of-00001.parquet", tmp_path / "no") == 2
    assert "not a readable parquet file" in capsys.readouterr().err


def test_parquet_of_plain_bytes_and_wrong_columns(small: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = FolderSource(small).read(0)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array([data, None], pa.binary())}), path)
    source = parquet.ParquetSource([path])
    assert source.read(0) == data
    assert source.labels is None
    with pytest.raises(OSError, match="no image bytes"):
        source.read(1)
    assert source.read(0) == data  # backwards, from the beginning of the group
    for columns, message in (
        ({"picture": [data]}, "has no column 'image', only 'picture'"),
        ({"image": ["a path"]}, "column 'image' is string"),
        ({"image": [data], "label": [0.5]}, "column 'label' is double"),
        ({"image": [data], "label": [-7]}, "numbers from -7"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=message):
            parquet.ParquetSource([path])


def test_a_damaged_row_group_costs_its_rows(small: Path, tables: Path) -> None:
    path = tables / "train-00000-of-00002.parquet"
    data = bytearray(path.read_bytes())
    at = data.find(FolderSource(small).read(6)[:50])
    data[4 : 4 + 40] = bytes(40)  # the first page's header
    path.write_bytes(data)
    source = parquet.ParquetSource([path])
    with pytest.raises(OSError, match=r"."):
        source.read(2)
    assert at > 0
    assert source.read(6) == FolderSource(small).read(6)


def test_without_pyarrow(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert run(tables, tables / "packed") == 2
    assert "pip install 'simmim[parquet]'" in capsys.readouterr().err


def write_rows(path: Path, labels: list[int | None], names: list[str] | None = None) -> Path:
    """A parquet file of images b"0", b"1", … with labels."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata=metadata)
    data = [f"{path.stem} {row}".encode() for row in range(len(labels))]
    table = pa.table([pa.array(data), pa.array(labels, pa.int64())], schema=schema)
    pq.write_table(table, path, row_group_size=3)
    return path


def test_rows_are_numbered_through_all_files_and_groups(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.parquet", [0] * size) for name, size in
             (("a", 7), ("b", 2), ("c", 4))]  # fmt: skip
    source = parquet.ParquetSource(files)
    wanted = [(name, row) for name, size in (("a", 7), ("b", 2), ("c", 4)) for row in range(size)]
    assert list(source.names) == [f"{name}.parquet/{row}" for name, row in wanted]
    order = [*range(13), 12, 0, 8, 3, 9]
    assert [source.read(n) for n in order] == [f"{wanted[n][0]} {wanted[n][1]}".encode()
                                               for n in order]  # fmt: skip


def test_labels_of_all_files_are_joined(tmp_path: Path) -> None:
    files = [
        write_rows(tmp_path / "a.parquet", [1, None, 0], ["owl", "cat", "dog"]),
        write_rows(tmp_path / "b.parquet", [-1, 2], ["owl", "cat", "dog"]),
    ]
    labels = parquet.ParquetSource(files).labels
    assert labels is not None
    assert labels.values.tolist() == [1, -1, 0, -1, 2]
    assert labels.classes == ("owl", "cat", "dog")
    bare = parquet.ParquetSource([write_rows(tmp_path / "c.parquet", [3, None])]).labels
    assert bare is not None
    assert bare.values.tolist() == [3, -1]
    assert bare.classes == ("0", "1", "2", "3")
    assert parquet.ParquetSource([write_rows(tmp_path / "d.parquet", [None])]).labels is None
    with pytest.raises(DataError, match="class 2 of 2 that its schema names"):
        parquet.ParquetSource([write_rows(tmp_path / "e.parquet", [2], ["owl", "cat"])])


def test_files_of_other_classes_are_refused(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.parquet", [0, 1], ["owl", "cat"])
    for names in (["cat", "owl"], None):
        second = write_rows(tmp_path / "b.parquet", [0, 1], names)
        with pytest.raises(DataError, match="differ in image column or classes"):
            parquet.ParquetSource([first, second])


def test_which_files_a_path_means(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "metadata.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def meant(path: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in parquet.parquet_files(f"{tmp_path}/{path}")]

    assert meant("") == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert meant("b.parquet") == ["b.parquet"]
    assert meant("[ab].parquet") == ["a.parquet", "b.parquet"]
    assert meant("notes.txt") == meant("nowhere") == meant("*") == []
    for split in ("train-00000-of-00001", "val-00000-of-00001-0a1b"):
        (tmp_path / "sub" / f"{split}.parquet").touch()
    with pytest.raises(DataError, match=r"the splits train, val; .*'.*/val-\*.parquet'"):
        meant("sub")
