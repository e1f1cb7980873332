"""Files of records: each line is a JSON row that belongs to a step. Broken lines are skipped."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from simmim.files import write_text


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file in order; a missing file has none.

    A line that a killed process left incomplete is skipped.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a file; numbers that are not finite become null, for JSON has none.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of later steps, which a resumed run makes again.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_file():
        write_text(path, "".join(_line(row) for row in read_rows(path) if row["step"] <= step))


def finite(value: Any) -> Any:
    """The value, or None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> str:
    return json.dumps({key: finite(value) for key, value in row.items()}) + "\n"
