"""Which samples DALI is given, and what the CPU path makes of the others."""

import errno
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dali_pipelines import AUGMENTATION, SEED, encoded, picture
from simmim.data.augment import augment, crop_box, is_flipped, sample_key
from simmim.data.dali.samples import Preparation
from simmim.data.decode import decode, read_header
from simmim.data.source import PackedStrings
from simmim.data.views import RandomCrops

JPEG = encoded(picture(90, 130), "JPEG", quality=90)
PNG = encoded(picture(90, 130), "PNG")


class Files:
    """A source of files that are held in memory, or of errors."""

    def __init__(self, *found: bytes | OSError) -> None:
        self.found, self.names = found, PackedStrings([str(n) for n in range(len(found))])

    def read(self, index: int) -> bytes:
        found = self.found[index]
        if isinstance(found, OSError):
            raise found
        return found


def prepared(*found: bytes | OSError, largest: int = 10**6, **crops: Any) -> Preparation:
    made = Preparation(Files(*found), RandomCrops(AUGMENTATION, SEED, **crops), largest)
    made.orientations = frozenset(range(1, 9))
    return made


def suits(made: Preparation, data: bytes = JPEG) -> bool:
    return made.suits_dali(data, read_header(data))


def test_dali_is_given_plain_jpegs_within_its_memory() -> None:
    assert suits(prepared())
    assert not suits(prepared(), PNG)
    assert not suits(prepared(), encoded(picture(), "JPEG", "CMYK"))
    assert suits(prepared(largest=90 * 130))
    assert not suits(prepared(largest=90 * 130 - 1))
    assert suits(prepared(max_pixels=90 * 130))
    assert not suits(prepared(max_pixels=90 * 130 - 1))
    long = JPEG[:2] + b"\xff\xfe\xff\xff" + bytes(65533) + JPEG[2:]  # a comment
    assert not suits(prepared(largest=20_000), long)
    assert suits(prepared(largest=len(long)), long)


def test_dali_is_given_the_orientations_that_it_turns_alike() -> None:
    made = prepared()
    made.orientations = frozenset({1, 6})
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(), "JPEG", exif=exif)
        assert suits(made, data) == (orientation != 3)


@pytest.mark.parametrize(("tail", "ends"), [(b"", True), (bytes(62), True), (bytes(63), False)])
def test_dali_is_given_whole_files(tail: bytes, ends: bool) -> None:
    assert suits(prepared(), JPEG + tail) == ends
    assert not suits(prepared(), JPEG[:-2])


@pytest.mark.parametrize("orientation", [1, 6])
def test_boxes_and_flips_are_those_of_the_cpu_path(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(90, 130), "JPEG", exif=exif)
    made = prepared(data, data)
    flips = set()
    for epoch, sample in ((0, 0), (0, 1), (3, 0), (5, 1)):
        found, key = made.prepare(epoch, sample), sample_key(SEED, epoch, sample)
        size = (130, 90) if orientation == 1 else (90, 130)
        assert found.box == crop_box(key, *size, AUGMENTATION.scale, AUGMENTATION.ratio)
        assert found.flip == is_flipped(key, AUGMENTATION.flip)
        assert (found.data, found.pixels, found.view) == (data, 90 * 130, None)
        assert (found.epoch, found.sample, found.problem) == (epoch, sample, "")
        flips.add(found.flip)
    always = Preparation(Files(data), RandomCrops(replace(AUGMENTATION, flip=1.0), SEED), 10**6)
    always.orientations = made.orientations
    assert all(always.prepare(epoch, 0).flip for epoch in range(8))
    assert len(flips) == 2


def test_what_is_not_dalis_is_made_here() -> None:
    made = prepared(PNG, JPEG, b"", b"x", JPEG[:600], OSError(errno.EIO, "Input/output error"))
    made.made_here.add(1)
    for sample, data in ((0, PNG), (1, JPEG)):
        found = made.prepare(2, sample)
        wanted = augment(decode(data, 3), sample_key(SEED, 2, sample), AUGMENTATION)
        assert not found.data
        assert found.view is not None
        assert np.array_equal(found.view, wanted)
    problems = [made.prepare(2, sample).problem for sample in range(2, 6)]
    assert problems[0] == "the file is empty"
    assert problems[3] == "Input/output error"
    assert all(problems)


def test_a_fault_of_the_machine_is_no_problem_of_an_image() -> None:
    with pytest.raises(OSError, match="Too many open files"):
        prepared(OSError(errno.EMFILE, "Too many open files")).prepare(0, 0)


def test_what_is_made_here_takes_limit_and_range() -> None:
    file = io.BytesIO()
    np.save(file, np.full((80, 90, 3), 1.5, dtype=np.float32))
    made = prepared(file.getvalue(), value_range=(0, 3))
    found = made.prepare(0, 0)
    assert found.view is not None
    assert set(np.unique(found.view)) == {128}
    assert "value" in prepared(file.getvalue()).prepare(0, 0).problem
    assert "more than the limit" in prepared(PNG, max_pixels=99).prepare(0, 0).problem
