"""Images in Hugging Face's parquet files, read front to back to be packed.

Source of the layout: huggingface/datasets: features in the schema's metadata, an image column of
struct{bytes, path} or of bytes, class names in ClassLabel.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.labels import MAX_CLASSES, Labels
from simmim.data.source import PARQUET_EXTENSION, PackedStrings
from simmim.errors import DataError

IMAGE_COLUMN, LABEL_COLUMN = "image", "label"

# Rows that are held at a time.
BATCH_ROWS = 16

# Read at a time from a file, instead of a row group of hundreds of megabytes.
_BUFFER_BYTES = 2**20

_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")


def parquet_files(path: str) -> list[Path]:
    """The parquet files that a path means, sorted: one file, a folder of them, or a pattern.

    Raises:
        DataError: a folder that holds several splits of a dataset.
    """
    root = Path(os.path.expanduser(path))
    if root.is_file():
        return [root] if root.suffix == PARQUET_EXTENSION else []
    if not root.exists():
        matching = sorted(Path(p) for p in glob.glob(str(root)))
        return matching if all(p.suffix == PARQUET_EXTENSION for p in matching) else []
    # metadata.parquet stands beside the image files that it describes
    paths = sorted(p for p in root.rglob(f"*{PARQUET_EXTENSION}") if p.stem != "metadata")
    matches = [_SPLIT.fullmatch(p.name) for p in paths]
    splits = sorted({match[1] for match in matches if match})
    if len(splits) > 1:
        raise DataError(
            f"{path}: holds the splits {', '.join(splits)}; choose one with a pattern in quotes: "
            f"'{os.path.commonpath([p.parent for p in paths])}/{splits[-1]}-*.parquet'"
        )
    return paths


class ParquetSource:
    """The rows of parquet files as images; quick from front to back only.

    Args:
        files: parquet files of one schema.

    Attributes:
        names: file/row of every image.
        labels: of the label column; None without one.

    Raises:
        DataError: pyarrow is not installed, or a file is damaged or has no images.
    """

    def __init__(self, files: list[Path]) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise DataError(
                f"{files[0]}: reading parquet needs pyarrow: pip install 'simmim[parquet]'"
            ) from None
        self._open = pq.ParquetFile
        self.files = files
        root = os.path.commonpath([p.parent for p in files])
        names: list[str] = []
        starts = [0]
        # per file, the first row of each row group, and where the last ends
        self._groups: list[NDArray[np.int64]] = []
        labels: list[tuple[NDArray[np.int64], tuple[str, ...]] | None] = []
        columns = set()
        for path in files:
            try:
                with pq.ParquetFile(path) as file:
                    metadata = file.metadata
                    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
                    columns.add(_image_column(file.schema_arrow, path))
                    labels.append(_labels(file, path))
            except (OSError, ValueError, KeyError, NotImplementedError) as error:
                raise DataError(f"{path}: not a readable parquet file: {_line(error)}") from None
            self._groups.append(np.cumsum([0, *rows], dtype=np.int64))
            relative = os.path.relpath(path, root)
            names += [f"{relative}/{row}" for row in range(sum(rows))]
            starts.append(len(names))
        if len(columns) > 1 or len({part and part[1] for part in labels}) > 1:
            raise DataError(f"{root}: its parquet files differ in image column or classes")
        self._column = columns.pop()
        self.names = PackedStrings(names)
        self._starts = np.array(starts, dtype=np.int64)
        self.labels = _join([part for part in labels if part is not None])
        self._at: tuple[int, int, int] | None = None  # process, file, row group
        self._batches: Iterator[Any] = iter(())
        self._batch: list[Any] = []
        self._first = 0
        self._damage = ""

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises OSError when they cannot be read."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[file])
        group = int(np.searchsorted(self._groups[file], row, side="right")) - 1
        at = os.getpid(), file, group
        if at != self._at or row < self._first:
            self._begin(at)
        while not self._damage and row >= self._first + len(self._batch):
            self._advance()
        if row >= self._first + len(self._batch):
            raise OSError(self._damage)
        image: Any = self._batch[row - self._first]
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise OSError("the row has no image bytes")
        return image

    def _begin(self, at: tuple[int, int, int]) -> None:
        _, file, group = self._at = at
        self._batch, self._first, self._damage = [], int(self._groups[file][group]), ""
        try:
            # no prefetching threads: the process may have been forked
            opened = self._open(self.files[file], pre_buffer=False, buffer_size=_BUFFER_BYTES)
            self._batches = opened.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        except (OSError, ValueError) as error:
            self._damage = _line(error)

    def _advance(self) -> None:
        self._first += len(self._batch)
        self._batch = []
        try:
            self._batch = next(self._batches).column(0).to_pylist()
        except StopIteration:
            self._damage = "the row group ends before this row"
        except (OSError, ValueError) as error:
            self._damage = _line(error)


def _line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]


def _image_column(schema: Any, path: Path) -> str:
    if IMAGE_COLUMN not in schema.names:
        raise DataError(
            f"{path}: has no column {IMAGE_COLUMN!r}, only {', '.join(map(repr, schema.names))}"
        )
    kind = str(schema.field(IMAGE_COLUMN).type)
    if kind in ("binary", "large_binary"):
        return IMAGE_COLUMN
    if kind.startswith("struct<") and re.search(r"\bbytes: (large_)?binary\b", kind):
        return f"{IMAGE_COLUMN}.bytes"
    raise DataError(
        f"{path}: column {IMAGE_COLUMN!r} is {kind[:80]}, neither bytes nor struct{{bytes, path}}"
    )


def _labels(file: Any, path: Path) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
    """Class numbers of a file's rows, -1 for none, and the names that its metadata gives."""
    schema = file.schema_arrow
    if LABEL_COLUMN not in schema.names:
        return None
    kind = str(schema.field(LABEL_COLUMN).type)
    if not re.fullmatch(r"u?int\d+", kind):
        raise DataError(f"{path}: column {LABEL_COLUMN!r} is {kind[:80]}, not integers")
    column = file.read(columns=[LABEL_COLUMN], use_threads=False).column(0).fill_null(-1)
    values = column.to_numpy().astype(np.int64)
    if len(values) and not -1 <= values.min() <= values.max() < MAX_CLASSES:
        raise DataError(
            f"{path}: column {LABEL_COLUMN!r} has numbers from {values.min()} to {values.max()}"
        )
    names: Any = ()
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[LABEL_COLUMN]["names"]
    except (KeyError, TypeError, ValueError):
        pass  # numbers without names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = ()
    if names and len(values) and values.max() >= len(names):
        raise DataError(f"{path}: class {values.max()} of {len(names)} that its schema names")
    return values, tuple(names)


def _join(parts: list[tuple[NDArray[np.int64], tuple[str, ...]]]) -> Labels | None:
    if not parts:
        return None
    values = np.concatenate([values for values, _ in parts])
    highest = int(values.max(initial=-1))
    if highest < 0:
        return None
    return Labels(values, parts[0][1] or tuple(str(n) for n in range(highest + 1)))
