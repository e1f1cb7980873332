"""Tests and examples read nothing that lies beside the repository: a clone of it has all."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("tests", "examples") for p in (ROOT / folder).rglob("*.py"))
# "shared" as a folder of its own, in one string or as a part of a path
BESIDE = re.compile(r"""\.\./shared\b|\bshared/data\b|/\s*["']shared["']|["']shared["']\s*/""")
PARENTS = re.compile(r"__file__\)(?:\.resolve\(\))?\.parents\[(\d+)\]")


def above_the_root(path: Path, text: str) -> list[str]:
    """What a file's text says that leads out of the repository."""
    depth = len(path.relative_to(ROOT).parts)
    climbs = [m.group() for m in PARENTS.finditer(text) if int(m.group(1)) >= depth]
    return climbs + [m.group() for m in BESIDE.finditer(text)]


def test_nothing_beside_the_repository_is_named() -> None:
    assert FILES
    for path in FILES:
        assert above_the_root(path, path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    "text",
    [
        "Path(__file__).parents[" + "2]",
        "Path(__file__).resolve().parents[" + "3]",
        'open("../' + 'shared/x")',
        'DATA = "shared' + '/data/photos.tar"',
        'ROOT / "sha' + 'red" / "photos.tar"',
    ],
)
def test_it_would_be_noticed(text: str) -> None:
    assert above_the_root(ROOT / "tests" / "conftest.py", text)
    assert not above_the_root(ROOT / "tests" / "engine" / "test_data.py", "parents[2]")
