"""DALI on the CPU: the CPU path's samples, crops and flips, nothing lost, nothing left."""

import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines import (
    AUGMENTATION,
    CPU,
    SEED,
    by_cpu,
    encoded,
    every,
    images,
    picture,
    pipeline,
)
from simmim.data.dali import backend
from simmim.data.dali import pipeline as pipeline_module
from simmim.data.dali.decoder import Decoder
from simmim.data.dali.memory import largest_sub_batch
from simmim.data.dali.samples import PreparedSample
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.views import CroppedView, RandomCrops
from simmim.distributed import World
from simmim.errors import DataError

needs_dali = pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int64) - b).mean())


def damaged() -> dict[str, bytes]:
    whole = encoded(picture(seed=9), "JPEG", quality=95)
    frame = whole.find(b"\xff\xc0") + 5
    return {
        "empty.jpg": b"",
        "garbage.jpg": np.random.default_rng(0).bytes(2000),
        "truncated.jpg": whole[: len(whole) // 2],
        "no_end.jpg": whole[:-2],
        "enormous.jpg": whole[:frame] + struct.pack(">HH", 50000, 50000) + whole[frame + 4 :],
    }


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good JPEGs among images that DALI may not get, and damaged ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(6):
        data = encoded(picture(90 + number, 130, number), "JPEG", quality=90)
        (folder / f"plain{number}.jpg").write_bytes(data)
    for name, data in damaged().items():
        (folder / name).write_bytes(data)
    (folder / "cmyk.jpg").write_bytes(encoded(picture(), "JPEG", "CMYK"))
    (folder / "a.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "palette.png").write_bytes(encoded(picture(), "PNG", "P"))
    (folder / "b.webp").write_bytes(encoded(picture(), "WEBP", lossless=True))
    deep = np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return folder


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_the_cpu_path(jpegs: Path, channels: int) -> None:
    source = open_source(str(jpegs))
    augmentation = replace(AUGMENTATION, size=(192, 192), channels=channels)
    made = images(list(pipeline(source, augmentation=augmentation).batches(every(source))))
    assert made.shape == (len(source.names), 192, 192, channels)
    for ours, theirs in zip(by_cpu(source, augmentation), made):
        assert ours is not None
        assert difference(ours, theirs) <= 1.0
        # a box one pixel further, or the other flip, is further away than that
        assert difference(ours[:, ::-1], theirs) > 1.0


@needs_dali
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned.jpg").write_bytes(encoded(picture(), "JPEG", quality=95, exif=exif))
    source = open_source(str(tmp_path))
    tested = pipeline(source)
    (filled,) = tested.batches(every(source))
    (ours,) = by_cpu(source)
    assert ours is not None
    assert difference(ours, filled.image[0].numpy()) <= 1.0
    assert tested.preparation.prepare(3, 0).data  # DALI's, and not decoded by us


@needs_dali
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"restart_marker_blocks": 2}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_kinds_of_jpeg(tmp_path: Path, mode: str, options: dict, channels: int) -> None:
    data = encoded(picture(), "JPEG", mode, quality=95, **options)
    (tmp_path / "a.jpg").write_bytes(data)
    source = open_source(str(tmp_path))
    augmentation = replace(AUGMENTATION, channels=channels)
    (filled,) = pipeline(source, augmentation=augmentation).batches(every(source))
    (ours,) = by_cpu(source, augmentation)
    assert ours is not None
    assert difference(ours, filled.image[0].numpy()) <= 1.0


@needs_dali
def test_what_dali_is_not_given_is_the_cpu_paths_to_the_bit(mixed: Path) -> None:
    source = open_source(str(mixed))
    filled = list(pipeline(source).batches(every(source)))
    reasons = {start + s: r for start, f in zip(range(0, 99, 8), filled) for s, r in f.problems}
    for name, ours, theirs in zip(source.names, by_cpu(source), images(filled)):
        if name in damaged():
            assert ours is None
            assert not theirs.any()
        elif name.startswith("plain"):
            assert ours is not None
            assert difference(ours, theirs) <= 1.0
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert {source.names[sample] for sample in reasons} == set(damaged())
    assert all(reasons.values())


@needs_dali
def test_an_epoch_visits_every_readable_image_once(mixed: Path) -> None:
    source = open_source(str(mixed))
    count = len(source.names)  # 16: four steps of four are an epoch
    loader = Loader(
        source,
        CroppedView(AUGMENTATION, SEED),
        seed=SEED,
        micro_batch=4,
        accumulation_steps=1,
        workers=0,
        prefetch=2,
        world=World(0, 1, CPU),
        producer=pipeline(source, micro_batch=4),
    )
    batches = [batch for step in loader.steps(0, count // 4) for batch in step]
    seen = torch.cat([batch.ids for batch in batches])
    readable = [i for i, name in enumerate(source.names) if name not in damaged()]
    assert sorted(seen[seen >= 0].tolist()) == readable
    for batch in batches:
        assert batch.num_valid == int((batch.ids >= 0).sum())
        assert not batch.image[batch.ids < 0].any()
        assert all(image.float().std() > 0 for image in batch.image[batch.ids >= 0])


@needs_dali
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_number_is_all_that_resuming_needs(jpegs: Path, rank: int) -> None:
    source = open_source(str(jpegs))
    order = SampleOrder(len(source.names), SEED)

    def run(first: int) -> list[np.ndarray]:
        places = MicroBatches(order, 5, 2, rank, 2, first, 7)
        # another number of threads and another budget: neither may change a byte
        memory = 2**28 if first else 2**29
        tested = pipeline(source, micro_batch=5, threads=1 + first, memory_bytes=memory)
        return [filled.image.numpy() for filled in tested.batches(places)]

    whole = run(0)
    assert len(whole) == 14
    for first in (1, 4):
        np.testing.assert_array_equal(np.stack(whole[2 * first :]), np.stack(run(first)))


@needs_dali
def test_shards_give_the_folders_pixels(
    jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = sorted(jpegs.iterdir())
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for path in files[number * 12 : number * 12 + 12]:
                archive.add(path, path.name)
    folder, shards = open_source(str(jpegs)), open_source(str(tmp_path))
    assert len(folder.names) == len(shards.names)
    np.testing.assert_array_equal(
        images(list(pipeline(folder).batches(every(folder)))),
        images(list(pipeline(shards).batches(every(shards)))),
    )


@needs_dali
@pytest.mark.parametrize("name", ["truncated.jpg", "garbage.jpg", "enormous.jpg"])
def test_a_batch_that_dali_fails_on_is_not_lost(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # DALI is given a damaged file: it throws the whole batch away
    for path in mixed.iterdir():
        if not path.name.startswith("plain") and path.name != name:
            path.unlink()
    source = open_source(str(mixed))
    said: list[str] = []
    tested = pipeline(source, micro_batch=4, report=said.append)
    monkeypatch.setattr(tested.preparation, "suits_dali", lambda data, header: True)
    offender = list(source.names).index(name)
    place = PreparedSample(3, offender, source.read(offender), 1, (0, 0, 130, 90))
    preparation = tested.preparation
    prepare = preparation.prepare
    monkeypatch.setattr(
        preparation,
        "prepare",
        lambda epoch, sample: (
            place
            if (sample, bool(preparation.made_here)) == (offender, False)
            else prepare(epoch, sample)
        ),
    )
    threads = threading.active_count()
    filled = list(tested.batches(every(source, 4)))
    assert threading.active_count() == threads
    problems = [(4 * number + s, r) for number, f in enumerate(filled) for s, r in f.problems]
    assert [sample for sample, _ in problems] == [offender]
    for sample, (ours, theirs) in enumerate(zip(by_cpu(source), images(filled))):
        if sample == offender:
            assert not theirs.any()
        else:
            assert ours is not None
            assert difference(ours, theirs) <= 1.0
    assert len(said) == 1
    if name != "garbage.jpg":  # where DALI does not say which it was
        assert name in said[0]
        assert preparation.made_here == {offender}


@needs_dali
def test_a_machine_that_fails_is_not_the_images_fault(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(jpegs))
    tested = pipeline(source, micro_batch=4)
    monkeypatch.setattr(pipeline_module, "agreeing_orientations", lambda *_: frozenset({1}))

    def fail(*_: object) -> None:
        raise RuntimeError("Critical error in pipeline:\nout of memory\n")

    monkeypatch.setattr(Decoder, "collect", fail)
    made = tested.batches(every(source, 4))
    views = by_cpu(source)
    for start in (0, 4):
        np.testing.assert_array_equal(np.stack(views[start : start + 4]), next(made).image)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"batch after batch \(out of memory\).*data.backend=cpu"):
        next(made)


class Idle:
    """Stands in for the decoder and the pass: keeps what they are given."""

    made: "list[tuple[tuple[Any, ...], dict[str, Any]]]"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.made.append((arguments, options))

    def run(self, places: Any) -> list[Any]:
        return list(places)

    def close(self) -> None:
        """Nothing to close."""


def test_every_setting_arrives_at_the_decoder_and_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoders: list[Any] = []
    passes: list[Any] = []
    said: list[str] = []
    monkeypatch.setattr(pipeline_module, "choose_backend", lambda *_: ("dali", ""))
    monkeypatch.setattr(pipeline_module, "Decoder", type("Decoder", (Idle,), {"made": decoders}))
    monkeypatch.setattr(pipeline_module, "Pass", type("Pass", (Idle,), {"made": passes}))
    monkeypatch.setattr(
        pipeline_module,
        "agreeing_orientations",
        lambda decoder, report: report("compared") or frozenset({1, 3}),
    )
    source = object()
    device = torch.device("cuda", 1)
    tested = pipeline_module.DaliPipeline(
        source, AUGMENTATION, 7, device=device, micro_batch=6, threads=3, prefetch=4,
        memory_bytes=2**28, max_pixels=999, value_range=(0, 5), timeout_s=12.0, report=said.append,
    )  # type: ignore[arg-type] # fmt: skip
    assert list(tested.batches([[(0, 1)]])) == [[(0, 1)]]
    pixels = largest_sub_batch(2**28, AUGMENTATION, micro_batch=6, threads=3)
    assert decoders == [
        (
            (AUGMENTATION, device),
            {"micro_batch": 6, "threads": 3, "largest_pixels": int(pixels / 4)},
        )
    ]
    [((preparation, readers, _), options)] = passes
    assert options == {
        "sub_batch_pixels": pixels, "prefetch": 4, "timeout_s": 12.0, "report": said.append,
    }  # fmt: skip
    assert len(readers.threads) == 3
    assert readers.closed
    assert preparation.source is source
    assert preparation.crops == RandomCrops(AUGMENTATION, 7, 999, (0, 5))
    assert preparation.largest_pixels == int(pixels / 4)
    assert preparation.orientations == {1, 3}
    assert said == ["compared"]
