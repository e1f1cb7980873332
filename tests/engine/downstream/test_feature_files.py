"""Files of features: what every format holds, to the bit, of batches that are given."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from simmim.data.labels import Labels
from simmim.downstream import feature_files as module
from simmim.downstream.feature_files import feature_files, write_features
from simmim.downstream.features import FeatureBatch
from simmim.errors import RunError

# Six of seven images can be read, in batches of two.
READABLE = [0, 1, 3, 4, 5, 6]
NAMES = [f"{number}.png" for number in range(7)]
LABELS = Labels(np.array([0, 0, 0, 1, -1, 1, 0]), ("a, cat", "dog"))
SUFFIXES = (".safetensors", ".npy", ".parquet")

Write = Callable[..., int]


@pytest.fixture
def given() -> list[Any]:
    """What `write_features` asked the model for."""
    return []


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, given: list[Any]) -> Write:
    """`write_features` of rows that are given for the readable images, layer by layer."""

    def write(path: Path, made: dict[str, Tensor], labels: Any = None, **options: Any) -> int:
        def shapes(model: Any, names: Any, pool: str) -> dict[str, tuple[int, ...]]:
            given.append((names, pool))
            return {name: tuple(rows.shape[1:]) for name, rows in made.items()}

        def batches(model: Any, source: Any, **named: Any) -> Iterator[FeatureBatch]:
            given.append(named)
            for start in range(0, 6, 2):
                part = slice(start, start + 2)
                ids = torch.tensor(READABLE[part])
                yield FeatureBatch(ids, {name: rows[part] for name, rows in made.items()})

        monkeypatch.setattr(module, "feature_shapes", shapes)
        monkeypatch.setattr(module, "feature_batches", batches)
        source = SimpleNamespace(names=options.pop("names", NAMES))
        return write_features(path, None, source, labels, **options)  # type: ignore[arg-type]

    return write


def rows_of(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(6, *shape, generator=torch.Generator().manual_seed(len(shape)))


def read_table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def of_parquet(path: Path, name: str = "feature") -> NDArray[Any]:
    column = pq.read_table(path)[name].combine_chunks()
    shape = [len(column)]
    while hasattr(column.type, "list_size"):
        shape.append(column.type.list_size)
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(shape)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=str)
def test_a_file_holds_the_readable_images(
    write: Write, tmp_path: Path, suffix: str, dtype: str, shape: tuple[int, ...]
) -> None:
    path, features = tmp_path / f"out{suffix}", rows_of(*shape)
    assert write(path, {"output": features}, LABELS, dtype=dtype) == 6
    expected = features.numpy().astype(dtype)
    if suffix == ".parquet":
        table = pq.read_table(path)
        assert table["id"].to_pylist() == READABLE
        assert table["name"].to_pylist() == [NAMES[sample] for sample in READABLE]
        # an image without a label has none, and not the number -1
        assert table["label"].to_pylist() == [0, 0, 1, None, 1, 0]
        assert table.column_names == ["id", "name", "label", "feature"]
        found = of_parquet(path)
    else:
        assert read_table(tmp_path / f"out{suffix}.csv") == [
            ["row", "id", "name", "label", "class"],
            ["0", "0", "0.png", "0", "a, cat"],
            ["1", "1", "1.png", "0", "a, cat"],
            ["2", "3", "3.png", "1", "dog"],
            ["3", "4", "4.png", "", ""],
            ["4", "5", "5.png", "1", "dog"],
            ["5", "6", "6.png", "0", "a, cat"],
        ]
        found = np.load(path) if suffix == ".npy" else load_file(path)["features"].numpy()
    if suffix == ".safetensors":
        tensors = load_file(path)
        assert tensors["ids"].tolist() == READABLE
        assert tensors["labels"].tolist() == [0, 0, 1, -1, 1, 0]
        assert set(tensors) == {"ids", "labels", "features"}
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    names = {file.name for file in feature_files(path)}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize("chunk", [7, 2**26])
def test_all_layers_in_one_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)  # several moves, several row groups
    layers = {"block 1": rows_of(3), "block 2": rows_of(2, 2), "output": rows_of(7)}
    arrays, table = tmp_path / "a.safetensors", tmp_path / "a.parquet"
    for path in (arrays, table):
        assert write(path, layers) == 6
    tensors, columns = load_file(arrays), pq.read_table(table)
    assert set(tensors) == {"ids", *layers}
    assert columns.column_names == ["id", "name", *layers]
    for name, values in layers.items():
        assert torch.equal(tensors[name], values)
        np.testing.assert_array_equal(of_parquet(table, name), values.numpy())
    assert pq.ParquetFile(table).num_row_groups == (3 if chunk == 7 else 1)
    assert read_table(tmp_path / "a.safetensors.csv")[:2] == [
        ["row", "id", "name"],
        [*"00", "0.png"],
    ]
    with pytest.raises(ValueError, match=r"a\.npy: an \.npy file holds one layer"):
        write(tmp_path / "a.npy", layers)


def test_a_file_tells_its_layers_pooling_and_classes(write: Write, tmp_path: Path) -> None:
    layers = {"block 1": rows_of(3), "output": rows_of(3)}
    arrays, table = tmp_path / "a.safetensors", tmp_path / "a.parquet"
    for path in (arrays, table):
        write(path, layers, LABELS, pool="cls")
    expected = {"layers": ["block 1", "output"], "pool": "cls", "classes": ["a, cat", "dog"]}
    with safe_open(arrays, "pt") as reader:
        assert json.loads(reader.metadata()["simmim.features"]) == expected
    assert json.loads(pq.read_schema(table).metadata[b"simmim.features"]) == expected
    # numbers lie at multiples of their size, as readers require
    assert int.from_bytes(arrays.read_bytes()[:8], "little") % 8 == 0
    write(arrays, layers)
    with safe_open(arrays, "pt") as reader:
        assert json.loads(reader.metadata()["simmim.features"]) == {
            "layers": ["block 1", "output"],
            "pool": "mean",
        }


def test_every_option_reaches_the_model(write: Write, given: list[Any], tmp_path: Path) -> None:
    options = {
        "layers": ["output"],
        "pool": "none",
        "batch_size": 3,
        "workers": 0,
        "precision": "bf16",
        "timeout_s": 7.0,
        "samples": [0, 1, 3, 4, 5, 6],
    }
    write(tmp_path / "out.npy", {"output": rows_of(2, 2)}, dtype="float16", **options)
    assert given == [(["output"], "none"), options]
    given.clear()
    write(tmp_path / "out.npy", {"output": rows_of(2)})
    assert given == [(None, "mean"), {}]


def test_what_is_not_finite_is_counted_and_written(write: Write, tmp_path: Path) -> None:
    first, second, told = rows_of(3), rows_of(2), list[str]()
    first[1, 2] = torch.nan
    second[0, 0], second[4, 1] = torch.inf, 1e5
    layers = {"block 1": first, "output": second}
    write(tmp_path / "a.safetensors", layers, dtype="float16", report=told.append)
    # of every batch those of the worst layer: one each of the first and of the last
    assert told == ["features of 2 of 6 images are not finite, or beyond float16"]
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["block 1"][1].isnan().tolist() == [False, False, True]
    assert tensors["output"][4, 1].isinf()
    told.clear()
    write(tmp_path / "a.safetensors", {"output": rows_of(2)}, report=told.append)
    assert told == []


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_room_is_reserved_before_the_first_image(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    reserved: list[int] = []
    real = os.posix_fallocate

    def noted(descriptor: int, start: int, size: int) -> None:
        assert start == 0
        reserved.append(size)
        real(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", noted)
    path = tmp_path / f"out{suffix}"
    write(path, {"output": rows_of(5)}, LABELS, dtype="float16")
    # a row of 5 × 2 bytes, beside two numbers of 8 bytes; six of seven rows are left in the end
    row = 10 if suffix == ".npy" else 26
    assert [size - path.stat().st_size for size in reserved] == [row]


def test_room_is_for_the_chosen_samples(write: Write, tmp_path: Path) -> None:
    # as many rows as were planned: nothing is moved, nothing is cut off
    path = tmp_path / "out.safetensors"
    assert write(path, {"output": rows_of(5)}, samples=np.array(READABLE)) == 6
    assert torch.equal(load_file(path)["features"], rows_of(5))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_fails_leaves_the_old_files(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"out{suffix}"
    for file in feature_files(path):
        file.write_text("old")

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    owner, name = (module._Parquet, "add") if suffix == ".parquet" else (os, "posix_fallocate")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_room)
        with pytest.raises(OSError, match="No space left"):
            write(path, {"output": rows_of(5)})
    broken = SimpleNamespace(shape=(6, 5), __getitem__=None)
    with pytest.raises(TypeError):
        write(path, {"output": broken})  # type: ignore[dict-item]
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        file.name: "old" for file in feature_files(path)
    }


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_names_that_are_no_utf8_stand_as_escapes(write: Write, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    labels = Labels(LABELS.values, ("caf\udce9", "dog"))
    write(path, {"output": rows_of(2)}, labels, names=["\udce8.png", *NAMES[1:]])
    if suffix == ".parquet":
        assert pq.read_table(path)["name"][0].as_py() == "\\udce8.png"
    else:
        row = read_table(tmp_path / "out.npy.csv")[1]
        assert row == ["0", "0", "\\udce8.png", "0", "caf\\udce9"]


def test_the_name_tells_the_format(tmp_path: Path) -> None:
    assert feature_files(Path("x/a.parquet")) == [Path("x/a.parquet")]
    assert feature_files(Path("x/a.npy")) == [Path("x/a.npy"), Path("x/a.npy.csv")]
    with pytest.raises(ValueError, match=r"a\.txt: .* end it with \.safetensors, \.npy or \.parq"):
        feature_files(Path("a.txt"))


def test_parquet_without_pyarrow_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RunError, match=r"^\.parquet files need pyarrow: pip install"):
        write(tmp_path / "out.parquet", {"output": rows_of(2)})
    assert not list(tmp_path.iterdir())
