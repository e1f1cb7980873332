"""Several crops of every image by DALI."""

import io
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from noisy_pictures import pictures
from simmim.data.augment import Augmentation
from simmim.data.dali import backend
from simmim.data.dali.crops import DaliCrops
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.open import open_source
from simmim.data.producer import Filled
from simmim.data.views import RandomCrops, TwoViews

AUGMENTATION = Augmentation((48, 64), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, 3)
CPU = torch.device("cpu")


class CountingPipeline:
    """Stands in for DALI: pixels tell epoch and sample, sample 5 is unreadable."""

    closed = False

    def batches(self, places: Iterable[list[tuple[int, int]]]) -> Generator[Filled, None, None]:
        try:
            for batch in places:
                image = torch.tensor(batch, dtype=torch.uint8).view(-1, 1, 2, 1)
                problems = [(slot, "damaged") for slot, (_, s) in enumerate(batch) if s == 5]
                yield Filled(image, problems)
        finally:
            self.closed = True


def test_dali_makes_each_crop_a_sample() -> None:
    pipeline, crops = CountingPipeline(), RandomCrops(AUGMENTATION, 4, per_sample=2)
    with closing(
        DaliCrops(pipeline, crops).batches([[(0, 4), (3, 5)], [(1, 6)]])  # type: ignore[arg-type]
    ) as batches:
        first = next(batches)
        assert first.image.shape == (2, 2, 1, 2, 1)
        assert first.image.view(2, 2, 2).tolist() == [[[0, 4], [1, 4]], [[6, 5], [7, 5]]]
        assert first.problems == [(1, "damaged")]
        assert next(batches).image.view(2, 2).tolist() == [[2, 6], [3, 6]]
    assert pipeline.closed


@pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())
def test_dali_makes_the_crops_of_the_cpu_path(tmp_path: Path) -> None:
    pixels = pictures(1, (120, 160))[0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(file.getvalue())
    (tmp_path / "9.jpg").write_bytes(b"no image")
    source = open_source(str(tmp_path))
    pipeline = DaliPipeline(
        source,
        replace(AUGMENTATION, scale=(0.5, 1.0)),
        4,
        device=CPU,
        micro_batch=6,
        threads=2,
        prefetch=1,
        memory_bytes=2**28,
    )
    places = [[(2, 0), (2, 5), (3, 1)], [(3, 2), (2, 3), (2, 4)]]
    view = TwoViews(pipeline.augmentation, 4)
    assert view.crops is not None
    expected = np.empty(view.shape, np.uint8)
    batches = list(DaliCrops(pipeline, view.crops).batches(places))
    assert [slot for slot, _ in batches[0].problems] == [1]
    assert not batches[1].problems
    for batch, filled in zip(places, batches):
        for slot, (epoch, sample) in enumerate(batch):
            if sample == 5:
                continue
            view.fill(expected, source.read(sample), epoch, sample)
            found = filled.image[slot].numpy().astype(np.int64)
            assert np.abs(found - expected).mean() < 1.0
