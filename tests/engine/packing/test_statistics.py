"""Mean and standard deviation of pixels, to the last digit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from packed_folders import contents, expected_statistics, run
from simmim.data.decode import decode
from simmim.data.folder import FolderSource
from simmim.data.open import open_source


def test_stats(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = FolderSource(small)
    assert run(small, "--stats") == 0
    found = capsys.readouterr().out.splitlines()
    assert found == expected_statistics([decode(before.read(i), 3) for i in range(14)])
    folder = tmp_path / "packed"
    assert run(small, folder, "--short-side", 30, "--stats") == 0
    found = capsys.readouterr().out.splitlines()[1:]
    source = open_source(str(folder))
    assert found == expected_statistics([decode(source.read(i), 3) for i in range(14)])
    kept = contents(folder)
    dataset = json.loads(kept["dataset.json"])
    assert len(dataset["mean"]) == len(dataset["std"]) == 3
    assert run(small, folder, "--short-side", 30) == 0  # forgets nothing
    assert contents(folder) == kept


def test_stats_of_many_channels_and_of_grey_among_rgb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(1)
    for name in ("five", "rgb"):
        (tmp_path / name).mkdir()
    arrays = [draw.integers(0, 99, (8, 9, 5), dtype=np.uint8) for _ in range(3)]
    for number, array in enumerate(arrays):
        np.save(tmp_path / "five" / f"{number}.npy", array)
    assert run(tmp_path / "five", "--stats") == 0
    assert capsys.readouterr().out.splitlines() == expected_statistics(arrays)
    colour = draw.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    grey = draw.integers(0, 256, (4, 9, 1), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "rgb" / "colour.png")
    Image.fromarray(grey[:, :, 0]).save(tmp_path / "rgb" / "grey.png")
    assert run(tmp_path / "rgb", "--stats") == 0
    expected = expected_statistics([colour, grey.repeat(3, axis=2)])
    assert capsys.readouterr().out.splitlines() == expected
    Image.fromarray(colour).convert("RGBA").save(tmp_path / "rgb" / "alpha.png")
    assert run(tmp_path / "rgb", tmp_path / "packed", "--stats") == 2
    error = capsys.readouterr().err
    assert "no mean and std: 1 images of 1, 1 images of 3, 1 images of 4 channels" in error
    assert json.loads((tmp_path / "packed" / "dataset.json").read_text())["channels"] is None
