"""DALI stays within the memory that it is given."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dali_pipelines import AUGMENTATION, by_cpu, encoded, every, images, picture, pipeline
from simmim.data.dali import backend, memory
from simmim.data.dali.decoder import Decoder
from simmim.data.dali.memory import estimate_bytes, largest_sub_batch
from simmim.data.open import open_source
from simmim.errors import DataError

needs_dali = pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())


@needs_dali
def test_a_small_budget_cuts_batches_and_changes_nothing(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(jpegs))
    scheduled: list[int] = []
    schedule = Decoder.schedule
    plenty, little = pipeline(source, micro_batch=24), pipeline(source, micro_batch=24)
    little.sub_batch_pixels = 600_000
    budget = plenty.sub_batch_pixels

    def counted(decoder: Decoder, samples: list) -> None:
        assert sum(s.pixels for s in samples) <= budget or len(samples) == 1
        scheduled.append(len(samples))
        schedule(decoder, samples)

    monkeypatch.setattr(Decoder, "schedule", counted)
    whole = images(list(plenty.batches(every(source, 24))))
    assert max(scheduled) == len(source.names)
    scheduled.clear()
    budget = little.sub_batch_pixels
    parts = images(list(little.batches(every(source, 24))))
    assert max(scheduled) < 12
    np.testing.assert_array_equal(whole, parts)


@needs_dali
def test_an_image_too_large_for_the_budget_is_decoded_here(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(encoded(picture(1200, 1300), "JPEG"))
    source = open_source(str(tmp_path))
    least = estimate_bytes(memory.MIN_PIXELS, AUGMENTATION, micro_batch=8, threads=2)
    tested = pipeline(source, memory_bytes=least)
    assert tested.largest_pixels < 1200 * 1300
    (filled,) = tested.batches(every(source))
    np.testing.assert_array_equal(by_cpu(source)[0], filled.image[0])
    (filled,) = pipeline(source, max_pixels=10**6).batches(every(source))
    assert "more than the limit" in filled.problems[0][1]


def test_too_little_memory_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(DataError, match=r"data\.dali_memory_mib=16 .* (\d+) is the least") as found:
        largest_sub_batch(2**24, AUGMENTATION, micro_batch=64, threads=4)
    least = int(str(found.value).split(":")[1].split()[0]) * 2**20
    assert largest_sub_batch(least, AUGMENTATION, micro_batch=64, threads=4) >= memory.MIN_PIXELS
    with pytest.raises(DataError):
        largest_sub_batch(least - 2**20, AUGMENTATION, micro_batch=64, threads=4)


@pytest.mark.parametrize("memory_bytes", [2**28, 2**30, 2**34])
def test_the_estimate_fills_the_budget_and_stays_within(memory_bytes: int) -> None:
    pixels = largest_sub_batch(memory_bytes, AUGMENTATION, micro_batch=64, threads=4)
    estimate = estimate_bytes(pixels, AUGMENTATION, micro_batch=64, threads=4)
    assert 0.98 * memory_bytes < estimate <= memory_bytes


MEMORY_TREND = """
import io, sys, numpy as np, torch
from PIL import Image
from simmim.data.augment import Augmentation
from simmim.data.dali.backend import missing_reason
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.source import PackedStrings

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

class Random:
    "JPEGs of all sizes up to what the budget lets pass, a tenth of them progressive."
    names = PackedStrings([str(i) for i in range(200)])
    files = []
    def read(self, index):
        return self.files[index]

budget = int(sys.argv[1])
draw = np.random.default_rng(1)
for i in range(200):
    h, w = draw.integers(60, 1400, 2)
    small = draw.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((int(w), int(h))).save(file, "JPEG", progressive=i % 10 == 0)
    Random.files.append(file.getvalue())
missing_reason()
torch.zeros(1)
augmentation = Augmentation((96, 96), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3)
made = DaliPipeline(Random(), augmentation, 1, device=torch.device("cpu"), micro_batch=32,
                    threads=2, prefetch=2, memory_bytes=budget)
places = ([(step, int(i)) for i in draw.integers(0, 200, 32)] for step in range(240))
before, peaks = resident(), []
for step, filled in enumerate(made.batches(places)):
    assert not filled.problems
    if step % 40 == 0:
        peaks.append(0)
    peaks[-1] = max(peaks[-1], resident() - before)
print(*peaks)
"""


@needs_dali
@pytest.mark.slow
def test_memory_stays_within_the_budget_and_does_not_grow() -> None:
    budget = 2**28
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_TREND, str(budget)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [int(peak) for peak in run.stdout.split()]
    assert len(peaks) == 6
    assert max(peaks) <= budget
    # holes in the heap come and go by some percent
    assert max(peaks[4:]) <= 1.1 * max(peaks[1:4])


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1 / 4, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_the_estimate_by_hand(ratio: tuple[float, float]) -> None:
    pixels, aspect = 10**6, max(ratio[1], 1 / ratio[0])
    augmentation = replace(AUGMENTATION, ratio=ratio)
    # 48 × 64 views of 3 channels, 8 images, 2 threads
    batches = 3 * (pixels + 3 * pixels + 2 * 8 * 48 * 64 * 3)
    decoders = 2 * (pixels // 4) * (6 + 2 * 3)
    between = 4 * 3 * 64 * (8 * aspect * pixels) ** 0.5
    found = estimate_bytes(pixels, augmentation, micro_batch=8, threads=2)
    assert found == pytest.approx(2**26 + 1.25 * (batches + decoders + between), abs=2)


def test_few_images_are_resized_at_once() -> None:
    many = estimate_bytes(10**6, AUGMENTATION, micro_batch=64, threads=2)
    views = 3 * 2 * 32 * 48 * 64 * 3 * 1.25
    assert many - estimate_bytes(10**6, AUGMENTATION, micro_batch=32, threads=2) == (
        pytest.approx(views, abs=2)
    )
