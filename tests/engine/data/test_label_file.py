"""Label files and files of classes: which columns, keys and words are read."""

from pathlib import Path

import pytest

from simmim.data.label_file import read_classes, read_labels
from simmim.errors import DataError


@pytest.mark.parametrize(
    ("name", "text", "entries"),
    [
        ("a.csv", "label,file\nx,1.jpg\n", [("1.jpg", "x", 2)]),
        # the preferred of several names, wherever it stands
        ("a.csv", "id,name,category_id,label\n7,1.jpg,3,x\n", [("1.jpg", "x", 2)]),
        ("a.csv", "LABEL;Image_ID\nx;1\n\ny;2\n", [("1", "x", 2), ("2", "y", 4)]),
        ("a.csv", "1.jpg , x \n./2.jpg,y\n", [("1.jpg", "x", 1), ("2.jpg", "y", 2)]),
        ("a.tsv", "1;2.jpg\tx,y\n", [("1;2.jpg", "x,y", 1)]),
        ("a.csv", "1;2.jpg;x,3\n", [("1;2.jpg;x", "3", 1)]),
        ("a.csv", '"1\n2.jpg",x\n3.jpg,y\n', [("1\n2.jpg", "x", 2), ("3.jpg", "y", 3)]),
        ("a.json", '{"1.jpg": "x", "1.jpg": "y"}', [("1.jpg", "x", 1), ("1.jpg", "y", 2)]),
        ("a.json", '[{"id": 9, "name": "1.jpg", "label": 3}]', [("1.jpg", "3", 1)]),
        ("a.JSONL", '\n["1.jpg", 0.5]\n', [("1.jpg", "0.5", 2)]),
        ("a.txt", "\ufeffmy cat.jpg 3\n\nb.jpg 4\n", [("my cat.jpg", "3", 1), ("b.jpg", "4", 3)]),
        ("a.txt", "my cat.jpg\tbig owl\n", [("my cat.jpg", "big owl", 1)]),
    ],
)
def test_entries_are_name_label_and_place(
    tmp_path: Path, name: str, text: str, entries: list[tuple[str, str, int]]
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    table = read_labels(tmp_path / name)
    assert table.names is not None
    assert list(zip(table.names, table.labels, table.places, strict=True)) == entries
    assert table.unit == ("entry" if name == "a.json" else "line")


def test_bare_numbers_have_no_names(tmp_path: Path) -> None:
    (tmp_path / "truth.txt").write_text("4\n\n-1\n2\n")
    table = read_labels(tmp_path / "truth.txt")
    assert (table.names, table.labels, table.places) == (None, ["4", "-1", "2"], [1, 3, 4])
    assert str(table.error(1, "what")).endswith("truth.txt, line 3: what")


@pytest.mark.parametrize(
    ("name", "text", "classes", "first"),
    [
        ("c.txt", "owl\ncat\n", ("owl", "cat"), None),
        ("c.txt", "barn owl\ncat\n", ("barn owl", "cat"), None),
        ("c.txt", "owl 2 x\ncat 1 y\n", ("cat", "owl"), 1),
        ("c.txt", "1 barn owl\n0 cat\n", ("cat", "barn owl"), 0),
        ("c.tsv", "barn owl\t6\ncat\t5\n", ("cat", "barn owl"), 5),
        ("c.json", '["owl", "cat"]', ("owl", "cat"), None),
        ("c.json", '{"owl": 1, "cat": 0}', ("cat", "owl"), 0),
        ("c.json", '{"2": "owl", "1": ["cat", "a cat"]}', ("cat", "owl"), 1),
    ],
)
def test_classes_stand_in_the_order_of_their_numbers(
    tmp_path: Path, name: str, text: str, classes: tuple[str, ...], first: int | None
) -> None:
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name) == (classes, first)


def test_long_refusals_are_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a.jpg,x\n" + ",".join(["b"] * 3) + "\n")
    with pytest.raises(DataError, match=r"a.csv, line 2: 3 columns instead of 2"):
        read_labels(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(f"label,{'x' * 9000},{'y' * 9000}\n1,2,3\n")
    with pytest.raises(DataError, match="none is a name") as caught:
        read_labels(tmp_path / "a.csv")
    assert len(str(caught.value)) < 800 + len(str(tmp_path))
