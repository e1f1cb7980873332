"""Writes features to .safetensors, .npy or .parquet files as they are computed.

Of all images, only their numbers and names are held in memory.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.data.labels import Labels
from simmim.data.source import Source
from simmim.downstream.features import (
    FeatureOptions,
    count_not_finite,
    feature_batches,
    feature_shapes,
)
from simmim.errors import RunError
from simmim.files import write_atomic
from simmim.model.image_model import ImageModel

SUFFIXES = (".safetensors", ".npy", ".parquet")
DTYPES = {"float32": torch.float32, "float16": torch.float16}

# The key of our metadata, in files that have room for some.
METADATA_KEY = "simmim.features"

# Bytes that are moved at a time, and bytes of a row group of parquet.
CHUNK_BYTES = 2**26

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64"}


def feature_files(path: Path) -> list[Path]:
    """The files that `write_features` writes for `path`.

    Raises:
        ValueError: a suffix that is none of SUFFIXES.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: the name tells the format; end it with {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]}"
        )
    return [path] if path.suffix == ".parquet" else [path, table_beside(path)]


def table_beside(path: Path) -> Path:
    """The table of numbers, names and labels beside a file of arrays."""
    return path.with_name(f"{path.name}.csv")


def write_features(
    path: Path,
    model: ImageModel,
    source: Source,
    labels: Labels | None = None,
    *,
    dtype: str = "float32",
    **options: Unpack[FeatureOptions],
) -> int:
    """Write the features of every readable image of a source.

    .safetensors: `ids` int64 [N] (the image's number in the source), `labels` int64 [N] where
    known (-1 for none), and `features` [N, D], or a tensor per layer under its name. .npy:
    [N, D], of one layer. Both have a table beside them (row, id, name, label) as FILE.csv.
    .parquet: columns id, name, label and `feature`, or one per layer.

    Args:
        path: file to write. Older files are replaced once all features are written.
        model: runs on the device where it lies.
        source: images.
        labels: their classes.
        dtype: "float32" or "float16".
        options: see `FeatureOptions`.

    Returns:
        How many images are in the file.

    Raises:
        DataError: none of the images can be read.
        RunError: pyarrow is missing and needed.
        OSError: the disk has no room.
        ValueError: an unknown suffix, layer or pooling, or several layers for .npy.
    """
    targets = feature_files(path)
    shapes = feature_shapes(model, options.get("layers"), options.get("pool", "mean"))
    if path.suffix == ".npy" and len(shapes) > 1:
        raise ValueError(f"{path}: an .npy file holds one layer; take .safetensors or .parquet")
    columns = {(n if len(shapes) > 1 else "features"): (dtype, s) for n, s in shapes.items()}
    samples = options.get("samples")
    planned = len(source.names if samples is None else samples)
    about = {"layers": list(shapes), "pool": options.get("pool", "mean")}
    if labels is not None:
        about["classes"] = list(labels.classes)
    count = 0

    def fill(temporary: Path, table: Path | None) -> None:
        nonlocal count
        writer: _Writer
        if path.suffix == ".parquet":
            writer = _Parquet(temporary, columns, labels, about)
        else:
            assert table is not None
            make = _safetensors_header if path.suffix == ".safetensors" else _npy_header
            writer = _Arrays(temporary, table, columns, labels, planned, make, about)
        with closing(writer):
            count = _stream(writer, model, source, labels, dtype, options)
            writer.finish()

    if len(targets) == 1:
        write_atomic(path, lambda temporary: fill(temporary, None))
    else:
        # the table is in its place before the arrays are
        write_atomic(path, lambda a: write_atomic(targets[1], lambda b: fill(a, b)))
    return count


class _Rows(NamedTuple):
    """Some images: their numbers, names, labels if known, and the features of every layer."""

    ids: NDArray[np.int64]
    names: Sequence[str]
    labels: NDArray[np.int64] | None
    features: Sequence[NDArray[Any]]


class _Writer(Protocol):
    def add(self, rows: _Rows) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


def _stream(
    writer: _Writer,
    model: ImageModel,
    source: Source,
    labels: Labels | None,
    dtype: str,
    options: FeatureOptions,
) -> int:
    count = not_finite = 0
    with closing(feature_batches(model, source, **options)) as batches:
        for batch in batches:
            ids = batch.ids.numpy()
            values = [v.to("cpu", DTYPES[dtype]) for v in batch.layers.values()]
            not_finite += max(count_not_finite(v) for v in values)
            names = [_utf8(source.names[sample]) for sample in ids.tolist()]
            known = None if labels is None else labels.values[ids]
            writer.add(_Rows(ids, names, known, [v.contiguous().numpy() for v in values]))
            count += len(ids)
    if not_finite:
        options.get("report", print)(
            f"features of {not_finite} of {count} images are not finite, or beyond {dtype}"
        )
    return count


Columns = Mapping[str, tuple[str, tuple[int, ...]]]


class _Arrays:
    """Arrays of one file, one after the other, and a table beside them.

    Every array gets room for the planned number of rows. If there are fewer in the end, the later
    arrays are moved up.

    Args:
        path: the file.
        table: the table.
        columns: name → type and shape of a row, for every layer of features.
        labels: written to the table, and to the file if its format has room for them; may be None.
        planned: the largest possible number of rows.
        make_header: (arrays, rows, about) → the bytes before the first array. Their number must
            not depend on the number of rows.
        about: metadata for the header.
    """

    def __init__(
        self,
        path: Path,
        table: Path,
        columns: Columns,
        labels: Labels | None,
        planned: int,
        make_header: Callable[[Columns, int, dict[str, Any]], bytes],
        about: dict[str, Any],
    ) -> None:
        # integers first, so that they lie at multiples of their size, as readers require
        whole = {"ids": ("int64", ())} | ({} if labels is None else {"labels": ("int64", ())})
        self._whole = whole if make_header is _safetensors_header else {}
        self._columns: Columns = {**self._whole, **columns}
        self._make_header, self._about = make_header, about
        self._start = len(make_header(self._columns, planned, about))
        self._row_bytes = [
            int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            for dtype, shape in self._columns.values()
        ]
        self._planned, self._rows, self._labels = planned, 0, labels
        with ExitStack() as opened:
            self._file: IO[bytes] = opened.enter_context(path.open("w+b"))
            # reserves the room, so that a full disk is noticed before the first image
            size_bytes = self._start + planned * sum(self._row_bytes)
            os.posix_fallocate(self._file.fileno(), 0, size_bytes)
            self._table = opened.enter_context(table.open("w", encoding="utf-8", newline=""))
            self._opened = opened.pop_all()
        self._csv = csv.writer(self._table, lineterminator="\n")
        self._csv.writerow(["row", "id", "name"] + ([] if labels is None else ["label", "class"]))

    def add(self, rows: _Rows) -> None:
        ids, names, labels, features = rows
        whole = [ids] if labels is None else [ids, labels]
        for at, values in enumerate([*whole[: len(self._whole)], *features]):
            self._file.seek(self._place(at, self._planned) + self._rows * self._row_bytes[at])
            self._file.write(np.ascontiguousarray(values).data)
        for row, (sample, name) in enumerate(zip(ids.tolist(), names), self._rows):
            cells: list[object] = [row, sample, name]
            if labels is not None and self._labels is not None:
                number = int(labels[row - self._rows])
                cells += ["", ""] if number < 0 else [number, _utf8(self._labels.classes[number])]
            self._csv.writerow(cells)
        self._rows += len(ids)

    def finish(self) -> None:
        for at, size in enumerate(self._row_bytes):
            before, after = self._place(at, self._planned), self._place(at, self._rows)
            if after < before:
                self._move(before, after, self._rows * size)
        self._file.truncate(self._place(len(self._row_bytes), self._rows))
        header = self._make_header(self._columns, self._rows, self._about)
        assert len(header) == self._start
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        self._table.flush()

    def close(self) -> None:
        self._opened.close()

    def _place(self, at: int, rows: int) -> int:
        return self._start + rows * sum(self._row_bytes[:at])

    def _move(self, before: int, after: int, size: int) -> None:
        # moves towards the start, so that nothing is overwritten before it was read
        for start in range(0, size, CHUNK_BYTES):
            self._file.seek(before + start)
            data = self._file.read(min(CHUNK_BYTES, size - start))
            self._file.seek(after + start)
            self._file.write(data)


def _safetensors_header(columns: Columns, rows: int, about: dict[str, Any]) -> bytes:
    # the size of its JSON in 8 bytes, then the JSON, which may end with spaces
    longest = len(_safetensors_json(columns, 10**15, about))
    size = -(-longest // 8) * 8
    return size.to_bytes(8, "little") + _safetensors_json(columns, rows, about).ljust(size)


def _safetensors_json(columns: Columns, rows: int, about: dict[str, Any]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(about)}}
    end = 0
    for name, (dtype, shape) in columns.items():
        start = end
        end += rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": [rows, *shape],
            "data_offsets": [start, end],
        }
    return json.dumps(header).encode()


def _npy_header(columns: Columns, rows: int, about: dict[str, Any]) -> bytes:
    # NumPy leaves room in its header for the first axis to grow
    ((dtype, shape),) = columns.values()
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out,
        {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (rows, *shape),
        },
    )
    return out.getvalue()


class _Parquet:
    """A parquet file, whose row groups are written as they fill.

    Args:
        path: the file.
        columns: name → type and shape of a row, for every layer of features.
        labels: whether there is a column of labels: None for none.
        about: metadata of the file.

    Raises:
        RunError: pyarrow is not installed.
    """

    def __init__(
        self, path: Path, columns: Columns, labels: Labels | None, about: dict[str, Any]
    ) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            # the file that is written here has a temporary name
            raise RunError(".parquet files need pyarrow: pip install 'simmim[parquet]'") from None
        self._pa = pa
        fields = [("id", pa.int64()), ("name", pa.string())]
        fields += [] if labels is None else [("label", pa.int64())]
        fields += [
            ("feature" if name == "features" else name, self._type(*column))
            for name, column in columns.items()
        ]
        schema = pa.schema(fields)
        self._schema = schema.with_metadata({METADATA_KEY: json.dumps(about)})
        self._writer = pq.ParquetWriter(path, self._schema)
        self._held: list[Any] = []
        self._held_bytes = 0

    def add(self, rows: _Rows) -> None:
        ids, names, labels, features = rows
        columns = [self._pa.array(ids), self._pa.array(names, self._pa.string())]
        if labels is not None:
            columns.append(self._pa.array(labels, mask=labels < 0))
        for values in features:
            array = self._pa.array(values.reshape(-1))
            for size in reversed(values.shape[1:]):
                array = self._pa.FixedSizeListArray.from_arrays(array, size)
            columns.append(array)
        batch = self._pa.record_batch(columns, schema=self._schema)
        self._held.append(batch)
        self._held_bytes += batch.nbytes
        if self._held_bytes >= CHUNK_BYTES:
            self._write_held()

    def finish(self) -> None:
        self._write_held()
        self._writer.close()

    def close(self) -> None:
        self._writer.close()

    def _write_held(self) -> None:
        if self._held:
            self._writer.write_table(self._pa.Table.from_batches(self._held))
        self._held, self._held_bytes = [], 0

    def _type(self, dtype: str, shape: tuple[int, ...]) -> Any:
        kind = self._pa.float32() if dtype == "float32" else self._pa.float16()
        for size in reversed(shape):
            kind = self._pa.list_(kind, size)
        return kind


def _utf8(text: str) -> str:
    # bytes of a file name that are not UTF-8 are lone surrogates here
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
