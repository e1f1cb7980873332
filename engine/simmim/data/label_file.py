"""Reads label files: CSV, TSV, JSON, JSON lines, and plain lists as ImageNet's val.txt."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simmim.errors import DataError

# What a column or a key may be called, the preferred first; case does not matter.
NAME_COLUMNS = (
    "name file_name filename file path filepath image image_name image_path image_id imageid img id"
).split()
LABEL_COLUMNS = (
    "label class class_id classid class_name label_id label_name target category category_id"
).split()


@dataclass
class LabelTable:
    """The entries of a label file, as written.

    Attributes:
        path: the file.
        unit: what `places` count: "line" or "entry".
        labels: numbers or class names, never empty.
        places: where each stands in the file, from 1.
        names: of the images; None for a list of bare numbers.
    """

    path: Path
    unit: str
    labels: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    names: list[str] | None = field(default_factory=list)

    def add(self, name: str, label: str, place: int) -> None:
        """One more entry."""
        assert self.names is not None
        self.places.append(place)
        self.labels.append(label)
        name = name.strip().removeprefix("./")
        self.names.append(name)
        if not name or not label:
            missing = "name" if not name else "label"
            raise self.error(len(self.labels) - 1, f"no {missing}; complete or remove it")

    def place(self, at: int) -> str:
        """Where an entry stands: "line 3"."""
        return f"{self.unit} {self.places[at]}"

    def name(self, at: int) -> str:
        """The image of an entry, in quotes."""
        return f'"{self.names[at]}"' if self.names else "an image"

    def error(self, at: int, what: str) -> DataError:
        """The error that names the file and the place of entry number `at`."""
        return DataError(f"{self.path}, {self.place(at)}: {_one_line(what)}")


def read_labels(path: Path) -> LabelTable:
    """Read a label file; its extension tells the layout.

    - .csv (comma or semicolon) and .tsv: name and label, quoted as the csv module reads it; or any
      columns below a header that names both (`NAME_COLUMNS`, `LABEL_COLUMNS`).
    - .json: {name: label}, [{"name": …, "label": …}, …] or [[name, label], …]; keys as the columns.
    - .jsonl, .ndjson: an object or a pair on every line.
    - all else: "name label" on every line, parted by a tab or the last space (ImageNet's val.txt,
      Swin's map files), or a number alone (ImageNet's ground truth).

    Raises:
        DataError: unreadable, empty, or a line that does not fit; names file, line and remedy.
    """
    text = _text(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        table = _of_columns(path, text, suffix)
    elif suffix == ".json":
        table = _of_json(path, text)
    elif suffix in (".jsonl", ".ndjson"):
        table = LabelTable(path, "line")
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                _add_record(table, _parse(path, line, number), number)
    else:
        table = _of_list(path, text)
    if not table.labels:
        raise DataError(f"{path}: no label in it; write an image's name and its label per line")
    return table


def read_classes(path: Path) -> tuple[tuple[str, ...], int | None]:
    """Read the names of classes: lines of "name", "name number …" or "number name", or JSON.

    The second is the layout of the ILSVRC development kit's map_clsloc.txt. JSON is a list of
    names, {name: number}, or {"number": name} with a name or [name, …].

    Returns:
        names in the order of their numbers, and the first number; None where they have no numbers.

    Raises:
        DataError: unreadable, empty, a name twice, or numbers with gaps.
    """
    text = _text(path)
    names: list[str] = []
    numbers: list[int] = []
    if path.suffix.lower() == ".json":
        value = _parse(path, text, None)
        pairs = value if isinstance(value, _Pairs) else [(name, None) for name in _listed(value)]
        for key, of_key in pairs:
            of_key = of_key[0] if isinstance(of_key, list) and of_key else of_key
            if isinstance(of_key, str):
                key, of_key = of_key, int(key) if _is_number(key) else key
            names.append(str(key))
            if isinstance(of_key, int):
                numbers.append(of_key)
    else:
        for line in text.split("\n"):
            words = line.strip().split("\t" if "\t" in line else None)
            name = line.strip()
            if len(words) > 1 and _is_number(words[1].strip()):
                name = words[0].strip()
                numbers.append(int(words[1]))
            elif len(words) > 1 and _is_number(words[0]):
                name = name.removeprefix(words[0]).strip()
                numbers.append(int(words[0]))
            if name:
                names.append(name)
    if not names:
        raise DataError(f"{path}: no class in it; write the name of a class per line")
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise DataError(f'{path}: class "{twice}" stands there twice; keep one')
    if not numbers:
        return tuple(names), None
    first = min(numbers)
    if sorted(numbers) != list(range(first, first + len(names))):
        raise DataError(
            f"{path}: {len(names)} classes are not numbered {first} to {first + len(names) - 1}; "
            "number all of them, without gaps"
        )
    return tuple(name for _, name in sorted(zip(numbers, names))), first


class _Pairs(list[tuple[str, Any]]):
    """A JSON object in which no key is lost: a dict would keep the last of two equal ones."""


def _one_line(text: str) -> str:
    # cells of a table may hold line breaks, and whole pages
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a readable label file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _parse(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        at = getattr(error, "lineno", 1) if line is None else line
        what = getattr(error, "msg", "") or str(error)
        raise DataError(f"{path}, line {at}: not JSON: {what}; correct it") from None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _of_json(path: Path, text: str) -> LabelTable:
    table = LabelTable(path, "entry")
    value = _parse(path, text, None)
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {_kind(value)}; write {{name: label}} or a list of entries")
    for number, record in enumerate(value, 1):
        _add_record(table, record, number)
    return table


def _add_record(table: LabelTable, record: Any, place: int) -> None:
    where = f"{table.path}, {table.unit} {place}"
    if isinstance(record, _Pairs):
        keys = [key for key, _ in record]
        of_key = dict(record)
        name, label = (of_key[keys[at]] for at in _columns(where, "keys", keys))
    elif isinstance(record, list | tuple) and len(record) == 2:
        name, label = record
    else:
        raise DataError(
            f'{where}: {_kind(record)}; write {{"name": …, "label": …}} or [name, label]'
        )
    if not isinstance(name, str):
        raise DataError(f"{where}: the name is {_kind(name)}; write a string")
    if not isinstance(label, str | int | float) or isinstance(label, bool):
        raise DataError(f"{where}: the label is {_kind(label)}; write a number or a class name")
    table.add(name, str(label).strip(), place)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, _Pairs):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{value!r}"[:40]


def _columns(where: str, kind: str, header: list[str]) -> tuple[int, int]:
    # the places of name and label
    lower = [cell.strip().lower() for cell in header]
    columns = []
    for role, accepted in (("name", NAME_COLUMNS), ("label", LABEL_COLUMNS)):
        at = next((lower.index(word) for word in accepted if word in lower), None)
        if at is None:
            raise DataError(
                f"{where}: of the {kind} {_one_line(', '.join(header)) or '(none)'} none is a "
                f"{role}; call it {', '.join(accepted[:4])} …"
            )
        columns.append(at)
    return columns[0], columns[1]


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes") from None


def _of_columns(path: Path, text: str, suffix: str) -> LabelTable:
    first = text.lstrip().partition("\n")[0]
    delimiter = "\t" if suffix == ".tsv" else ";" if ";" in first and "," not in first else ","
    table = LabelTable(path, "line")
    name_at, label_at, width = 0, 1, 2
    for number, (line, row) in enumerate(_rows(path, text, delimiter)):
        if number == 0:
            cells = {cell.strip().lower() for cell in row}
            if cells.intersection(NAME_COLUMNS) or cells.intersection(LABEL_COLUMNS):
                name_at, label_at = _columns(f"{path}, line {line}", "columns", row)
                width = len(row)
                continue
        if len(row) != width:
            raise DataError(
                f"{path}, line {line}: {len(row)} columns instead of {width}; write name and "
                "label, or a header that names them"
            )
        table.add(row[name_at], row[label_at].strip(), line)
    return table


def _of_list(path: Path, text: str) -> LabelTable:
    table = LabelTable(path, "line")
    bare: bool | None = None  # numbers without names
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        if bare is None:
            bare = len(line.split()) == 1
        if not bare:
            name, _, label = line.rpartition("\t" if "\t" in line else " ")
            table.add(name, label.strip(), number)
            continue
        table.names = None
        table.places.append(number)
        table.labels.append(line)
        if not line.removeprefix("-").isdecimal():
            what = f'"{line[:80]}" is neither a number nor a name and its label'
            raise table.error(len(table.labels) - 1, f"{what}; write one of both")
    return table
