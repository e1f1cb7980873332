"""The JSON files that benchmarks write."""

import json
from pathlib import Path
from typing import Any

from simmim.files import write_text


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON; missing folders are made."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
