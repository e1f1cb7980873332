"""The JSON files that benchmarks write."""

import json
from pathlib import Path
from typing import Any

from simmim.files import write_text


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, with one line for every row; missing folders are made."""
    write_text(path, _broken(record, 0) + "\n")


def _text(value: Any, depth: int) -> str:
    """A value that holds only lists and objects is broken into lines; any other is one line."""
    members = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list)) and value and all(type(m) in (dict, list) for m in members):
        return _broken(value, depth)
    return json.dumps(value, ensure_ascii=False)


def _broken(value: dict[str, Any] | list[Any], depth: int) -> str:
    """The members of a value, each on its own line."""
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_text(member, depth + 1)}" for key, member in value.items()]
    else:
        lines = [_text(member, depth + 1) for member in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    begin = "\n" + " " * (depth + 1)
    return f"{opening}{begin}{f',{begin}'.join(lines)}\n{' ' * depth}{closing}"
