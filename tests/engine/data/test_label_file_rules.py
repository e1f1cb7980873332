"""What a label file of any layout says is what was written to it."""

import csv
import io
import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from simmim.data.label_file import (
    LABEL_COLUMNS,
    NAME_COLUMNS,
    LabelTable,
    read_classes,
    read_labels,
)

# Anything that stands on one line and does not begin or end with a blank.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12
).filter(lambda text: text == text.strip() and not text.startswith(("./", "\ufeff")))
ENTRIES = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
Entries = list[tuple[str, str]]


def read(suffix: str, text: str) -> LabelTable:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"labels{suffix}")
        path.write_bytes(text.encode())
        return read_labels(path)


def entries_of(table: LabelTable) -> Entries:
    assert table.names is not None
    return list(zip(table.names, table.labels, strict=True))


@given(
    entries=ENTRIES,
    delimiter=st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t")]),
    columns=st.tuples(st.sampled_from(NAME_COLUMNS), st.sampled_from(LABEL_COLUMNS)),
    turned=st.booleans(),
    others=st.integers(0, 2),
)
def test_a_table_with_a_header(
    entries: Entries,
    delimiter: tuple[str, str],
    columns: tuple[str, str],
    turned: bool,
    others: int,
) -> None:
    suffix, character = delimiter
    text = io.StringIO()
    writer = csv.writer(text, delimiter=character, lineterminator="\n")
    writer.writerow([*["other"] * others, *(columns[::-1] if turned else columns)])
    writer.writerows([[*"x" * others, *(row[::-1] if turned else row)] for row in entries])
    table = read(suffix, text.getvalue())
    assert entries_of(table) == entries
    assert table.places == list(range(2, len(entries) + 2))


@given(entries=ENTRIES, kind=st.sampled_from(["object", "pairs", "records"]))
def test_json(entries: Entries, kind: str) -> None:
    value: object = entries
    if kind == "object":
        entries = list(dict(entries).items())
        value = dict(entries)
    elif kind == "records":
        value = [{"image": name, "other": 1, "class": label} for name, label in entries]
    table = read(".json", json.dumps(value))
    assert entries_of(table) == entries
    assert table.places == list(range(1, len(entries) + 1))


@given(entries=ENTRIES, blank=st.integers(0, 2))
def test_lines_of_json_and_lines_of_words(entries: Entries, blank: int) -> None:
    gap = "\n" * (blank + 1)
    for suffix, lines in (
        (".jsonl", [json.dumps(entry) for entry in entries]),
        (".txt", ["\t".join(entry) for entry in entries]),
    ):
        table = read(suffix, gap.join(lines) + "\n")
        assert entries_of(table) == entries
        assert table.places == list(range(1, len(entries) * (blank + 1) + 1, blank + 1))


@given(numbers=st.lists(st.integers(-5, 10**6), min_size=1, max_size=8))
def test_bare_numbers(numbers: list[int]) -> None:
    table = read(".txt", "\n".join(map(str, numbers)))
    assert table.names is None
    assert table.labels == [str(number) for number in numbers]


@given(
    names=st.lists(
        TEXTS.filter(lambda text: len(text.split()) == 1 and not text.isdecimal()),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    first=st.integers(0, 3),
    kind=st.sampled_from(["name", "name number", "number name", "object", "number: name"]),
    data=st.data(),
)
def test_classes_come_in_the_order_of_their_numbers(
    names: list[str], first: int, kind: str, data: st.DataObject
) -> None:
    numbered = data.draw(st.permutations(list(enumerate(names, first))), label="order in the file")
    if kind == "name":
        text, first_number = "\n".join(names), None
    else:
        first_number = first
        text = {
            "name number": "\n".join(f"{name} {number} rest" for number, name in numbered),
            "number name": "\n".join(f"{number} {name}" for number, name in numbered),
            "object": json.dumps({name: number for number, name in numbered}),
            "number: name": json.dumps({str(number): name for number, name in numbered}),
        }[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "classes.json" if kind in ("object", "number: name") else "classes.txt")
        path.write_bytes(text.encode())
        assert read_classes(path) == (tuple(names), first_number)
