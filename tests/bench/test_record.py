"""The JSON files of benchmarks: what is read is what was written, and rows have lines."""

import json
from pathlib import Path

from bench.measuring.record import write_record


def test_every_row_has_a_line(tmp_path: Path) -> None:
    record = {
        "machine": {"cpu": "8 × “fast”", "flags": ["avx2"], "versions": {"timm": None}},
        "settings": {},
        "checks": {"timm": {"error": 1e-7}, "other": {"error": float("inf")}},
        "rows": [{"name": "ours", "spread": [1.5, 2]}, {"name": "theirs", "note": "a\nb"}],
        "skipped": [],
        "step": 3,
    }
    path = tmp_path / "new" / "record.json"
    write_record(path, record)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == record
    lines = text.splitlines()
    assert '  {"name": "ours", "spread": [1.5, 2]},' in lines
    assert '  "timm": {"error": 1e-07},' in lines
    assert len(lines) == 14
