"""Photos for DALI, sound and damaged."""

import io
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def jpegs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as JPEGs, where they are none."""
    folder = tmp_path_factory.mktemp("jpegs")
    for path in sorted(photos.iterdir()):
        data = path.read_bytes()
        if not data.startswith(b"\xff\xd8"):
            file = io.BytesIO()
            Image.open(path).convert("RGB").save(file, "JPEG", quality=92)
            data = file.getvalue()
        (folder / path.name).with_suffix(".jpg").write_bytes(data)
    return folder
