"""`simmim models`: every flag arrives, and every number stands in its column."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from recorded_calls import record
from simmim.backbone.build import PRESETS
from simmim.commands import models as command
from simmim.commands.model_table import Entry

ENTRIES = [
    Entry("one", (96, 64), 1_230_000, 4_560_000_000, {"simmim": 2_000_000}, ("simmim", "timm")),
    Entry(
        "two",
        (32, 32),
        5_000,
        70_000_000,
        {"simmim": 1_000_000, "simsiam": 3_000_000, "tokens": 4_000_000},
        ("simmim",),
    ),
]


def entries(**given: Any) -> Iterator[Entry]:
    return iter(ENTRIES)


@pytest.mark.parametrize(
    ("flags", "names", "size"), [([], [], None), (["a", "b", "--image-size=96"], ["a", "b"], 96)]
)
def test_every_flag_arrives(
    flags: list[str], names: list[str], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record(monkeypatch, command, "model_table", entries)
    assert command.main(flags) == 0
    assert command.main([*flags, "--json"]) == 0
    assert calls == 2 * [{"names": names, "image_size": size}]


def test_every_number_has_its_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(monkeypatch, command, "model_table", entries)
    assert command.main(["one", "two"]) == 0
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["backbone", "px", "GMACs", "encoder", "simmim", "simsiam", "tokens", "layouts"]
    assert rows[0] == ["one", "96", "4.56", "1.23", "M", "2.00", "M", "–", "–", "simmim", "timm"]
    assert rows[1] == "two 32 0.07 0.01 M 1.00 M 3.00 M 4.00 M simmim".split()
    assert [row[0] for row in rows[4:]] == ["simmim", "simsiam", "tokens"]


def test_columns_stand_beneath_their_headings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(monkeypatch, command, "model_table", entries)
    for names in ([], ["resnet18", "vit_tiny"]):
        assert command.main(names) == 0
        head, *rows = capsys.readouterr().out.splitlines()[:3]
        assert rows[0].index("simmim") == head.index("layouts")
        assert head.index("px") == max(map(len, names or PRESETS)) + 2 + 3


def test_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(monkeypatch, command, "model_table", entries)
    assert command.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {
        "name": "one",
        "image_size": [96, 64],
        "parameters": 1_230_000,
        "macs": 4_560_000_000,
        "methods": {"simmim": 2_000_000},
        "layouts": ["simmim", "timm"],
    }


@pytest.mark.parametrize("size", [0, -1])
def test_an_image_has_pixels(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main([f"--image-size={size}"])
    assert stop.value.code == 2
    assert f"--image-size={size} must be at least 1" in capsys.readouterr().err
