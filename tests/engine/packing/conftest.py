"""Images to pack, in class folders and of several kinds."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 photos in two class folders: JPEGs below and above 64 pixels, a PNG, a turned JPEG."""
    root = tmp_path_factory.mktemp("small")
    for number, path in enumerate(sorted(photos.iterdir())[:12]):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        with Image.open(path) as image:
            side = 40 + 20 * number
            image.convert("RGB").resize((side + 9, side)).save(folder / f"{number:02d}.jpg")
            if number == 3:
                image.convert("RGB").resize((50, 60)).save(folder / "small.png")
            if number == 4:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.convert("RGB").resize((55, 45)).save(folder / "turned.jpg", exif=exif)
    return root
