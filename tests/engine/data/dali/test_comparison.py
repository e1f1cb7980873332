"""DALI's pixels are compared with those of the CPU path before a run trusts them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_pipelines import every, pipeline
from simmim.data.dali import backend, comparison
from simmim.data.dali.comparison import probe_image
from simmim.data.decode import decode
from simmim.data.open import open_source
from simmim.errors import DataError

needs_dali = pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())


@needs_dali
def test_pixels_are_compared_before_the_first_batch(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(jpegs))
    said: list[str] = []
    tested = pipeline(source, report=said.append)
    real = decode

    def turned_otherwise(data: bytes, channels: int | None, **options: object) -> np.ndarray:
        pixels = real(data, channels)
        return pixels if b"Exif" not in data or upright(data) else pixels[:, ::-1].copy()

    def upright(data: bytes) -> bool:
        return Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) == 1

    monkeypatch.setattr(comparison, "decode", turned_otherwise)
    next(tested.batches(every(source)))
    assert tested.preparation.orientations == {1}
    assert len(said) == 1
    upside_down = real(probe_image(1), 3)[::-1].copy()
    monkeypatch.setattr(comparison, "decode", lambda *_, **__: upside_down)
    with pytest.raises(DataError, match="DALI's pixels differ"):
        next(pipeline(source).batches(every(source)))
