"""Files of records: rows of steps, cut back on resume, whatever a killed process left in them."""

import json
import math
from pathlib import Path

from simmim.training.records import append_rows, drop_rows_after, read_rows


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "loss": step / 3, "name": "é"} for step in range(4)]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert list(read_rows(path)) == rows


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert list(read_rows(tmp_path / "none.jsonl")) == []
    drop_rows_after(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": 1, "loss": math.nan, "norm": math.inf, "lr": 0.5}])
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "norm": None, "lr": 0.5}


def test_later_rows_and_torn_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": step} for step in (1, 2, 3)])
    with path.open("a") as file:
        file.write('[1]\n{"step": "4"}\n{"step": 5, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    drop_rows_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
