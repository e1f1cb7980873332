"""bench/data.py on a few photos and for fractions of a second: its rows, JSON, plot, messages."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench import data

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
}


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "data.py"), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def jpegs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos as JPEG, and a PNG that not every loader reads."""
    folder = tmp_path_factory.mktemp("jpegs")
    for path in sorted(photos.iterdir())[:6]:
        with Image.open(path) as photo:
            photo.convert("RGB").save(folder / f"{path.stem}.jpg")
    Image.new("RGB", (40, 40)).save(folder / "other.png")
    return folder


def test_rows(jpegs: Path, tmp_path: Path) -> None:
    drawn = importlib.util.find_spec("matplotlib") is not None
    plot = [f"--plot={tmp_path / 'rows.png'}"] if drawn else []
    result = run_bench(
        f"--source={jpegs}",
        f"--json={tmp_path / 'rows.json'}",
        "--only=simmim,decode-only",
        "--rounds=2",
        "--seconds=0.2",
        "--batch=4",
        "--size=64",
        *plot,
    )
    assert result.returncode == 0, result.stderr
    assert "1 of 7 images left out" in result.stderr
    record = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert sorted(rows) == ["decode-only", "decode-only-packed", "simmim", "simmim-packed"]
    for row in rows.values():
        assert row["slowest"] <= row["images_per_s_per_core"] <= row["fastest"]
        assert row["cpu_s_per_image"] > 0
        assert row["peak_bytes"] > 2**20
    assert record["settings"] == {"size": 64, "batch": 4, "rounds": 2, "seconds": 0.2}
    assert record["versions"]["simplejpeg"]
    assert "simmim" in result.stdout
    if drawn:
        with Image.open(tmp_path / "rows.png") as picture:
            assert picture.width > 800


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=nowhere"], "nowhere: no such file or folder"),
        (["--source=.", "--only=ffcv"], "--only=ffcv: known are simmim"),
        (["--source=.", "--json=nowhere/x.json"], "nowhere is no folder"),
    ],
)
def test_wrong_arguments(
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/data.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        data.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
