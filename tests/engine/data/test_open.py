"""What a path means, and what is said of one that means no images."""

from pathlib import Path

import pytest

from simmim.data.open import open_source
from simmim.errors import DataError


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.jpg").write_text("x")
    with pytest.raises(DataError, match=f"{tmp_path}: no image"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(str(tmp_path / "missing"))
