"""Damage to a packed folder is found and named."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from packed_folders import index_of, run
from simmim.commands import pack as pack_command
from simmim.data.labels import Labels
from simmim.data.source import PackedStrings
from simmim.errors import DataError
from simmim.packing import plan
from simmim.packing.encode import Encoded
from simmim.packing.options import Options
from simmim.packing.pack import pack
from simmim.packing.verify import verify


def test_verify_names_every_damage(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    assert run(small, folder, "--images-per-shard", 4) == 0
    index = index_of(folder, 0)
    with (folder / "000000.tar").open("r+b") as file:
        file.seek(index["offset"][1] + 30)
        file.write(b"\0\1\2")
        file.seek(index["offset"][2] + index["size"][2] + -index["size"][2] % 512 + 512)
        file.write(b"9")
    (folder / "000001.tar").unlink()
    (folder / "000002.idx").write_text("v1.2 4\n")
    wrong = index_of(folder, 3)
    wrong["width"][0] += 1
    (folder / "000003.json").write_text(json.dumps(wrong))
    capsys.readouterr()
    assert run("--verify", folder) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("000000.tar: 00000001.jpg: damaged")
    assert lines[1] == "000000.tar: 00000002.jpg: its label is not 0"
    assert lines[2].startswith("000001.tar: No such file")
    assert lines[3] == "000002.tar: its .idx is damaged"
    assert lines[4].startswith("000003.tar: 00000012.jpg: is [")
    assert len(lines) == 5
    assert "5 problems" in error


def test_verify_decodes_and_limits_its_lines(
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Encoded(b"no image", "jpg", 5, 5, 3)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", lambda data, options: broken)
        assert run(small, tmp_path / "packed") == 0
    monkeypatch.setattr(pack_command, "MAX_PROBLEMS", 5)
    capsys.readouterr()
    assert run("--verify", tmp_path / "packed") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("000000.tar: 00000000.jpg: unreadable: ")
    assert lines[5:] == ["… and 9 more"]
    assert run("--verify", small) == 2
    assert "dataset.json: No such file" in capsys.readouterr().err


class Arrays:
    """A source of equal arrays."""

    def __init__(self, array: np.ndarray, count: int) -> None:
        file = io.BytesIO()
        np.save(file, array)
        self.data = file.getvalue()
        self.names = PackedStrings([f"{number}.npy" for number in range(count)])

    def read(self, index: int) -> bytes:
        return self.data


def packed(folder: Path, count: int = 5, **options: Any) -> Path:
    """Images of 6 × 5 pixels and 2 channels, two to a shard, with labels."""
    labels = Labels(np.arange(count) % 2, ("even", "odd"))
    source = Arrays(np.full((6, 5, 2), 500, dtype=np.float32), count)
    settings = {"images_per_shard": 2, "value_range": (0, 1000)} | options
    pack(source, folder, Options(**settings), labels)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_image_of_every_shard_is_checked(tmp_path: Path, workers: int) -> None:
    told: list[int] = []
    assert verify(packed(tmp_path), workers=workers, tick=told.append) == (5, [])
    assert told[-1] == 5


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_damage_is_told_of_its_shard(tmp_path: Path, shard: int) -> None:
    (packed(tmp_path) / f"{shard:06d}.idx").write_text("v1.2 9\n")
    assert verify(tmp_path)[1] == [f"{shard:06d}.tar: its .idx is damaged"]
    (tmp_path / f"{shard:06d}.idx").unlink()
    assert verify(tmp_path)[1] == [f"{shard:06d}.tar: its .idx is missing or damaged"]


def test_values_and_channels_are_those_of_the_pack(tmp_path: Path) -> None:
    # its originals hold other numbers, and only the options say what their values mean
    packed(tmp_path, keep_originals=True)
    assert verify(tmp_path)[1] == []
    dataset = tmp_path / "dataset.json"
    options = json.loads(dataset.read_text())["options"]
    edit(dataset, options=options | {"value_range": None})
    _, problems = verify(tmp_path)
    assert len(problems) == 5
    assert "unreadable: " in problems[0]


def test_channels_that_every_image_was_given_are_asked_for(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (6, 5)).save(file, "PNG")
    source = Arrays(np.zeros((1, 1, 1), np.uint8), 2)
    source.data = file.getvalue()
    pack(source, tmp_path, Options(channels=3, keep_originals=True))
    assert verify(tmp_path) == (2, [])
    dataset = tmp_path / "dataset.json"
    options = json.loads(dataset.read_text())["options"]
    edit(dataset, options=options | {"channels": None})
    assert verify(tmp_path)[1][0] == "000000.tar: 00000000.png: is [5, 6, 1], not [5, 6, 3]"


def test_a_size_that_is_not_the_images_is_told(tmp_path: Path) -> None:
    packed(tmp_path, count=1)
    edit(tmp_path / "000000.json", height=[7])
    assert verify(tmp_path)[1] == ["000000.tar: 00000000.png: is [6, 5, 2], not [7, 5, 2]"]


def test_the_number_of_images_is_checked(tmp_path: Path) -> None:
    edit(packed(tmp_path) / "dataset.json", images=6)
    assert verify(tmp_path) == (5, ["dataset.json: says 6 images, the indices 5"])
    edit(tmp_path / "dataset.json", images=None)
    with pytest.raises(DataError, match="a pack that is not finished"):
        verify(tmp_path)
