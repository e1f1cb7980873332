"""DALI on the CPU: the CPU path's samples, crops and flips, nothing lost, nothing left."""

import errno
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data import dali
from simmim.data.augment import Augmentation, augment, sample_key
from simmim.data.cropped import CroppedView
from simmim.data.dali import DaliPipeline, choose_backend, estimate_bytes, largest_sub_batch
from simmim.data.decode import UnreadableImage, decode
from simmim.data.loader import Loader
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.producer import Filled
from simmim.data.source import DataError, Source, open_source
from simmim.distributed import World

AUGMENTATION = Augmentation((48, 64), (0.4, 1.0), (3 / 4, 4 / 3), 0.5, 3)
CPU = torch.device("cpu")
SEED = 5

needs_dali = pytest.mark.skipif(bool(dali.missing_reason()), reason=dali.missing_reason())


def pipeline(source: Source, **options: object) -> DaliPipeline:
    settings: dict = {
        "device": CPU,
        "micro_batch": 8,
        "threads": 2,
        "prefetch": 2,
        "memory_bytes": 2**28,
    }
    augmentation = options.pop("augmentation", AUGMENTATION)
    assert isinstance(augmentation, Augmentation)
    return DaliPipeline(source, augmentation, SEED, **(settings | options))


def every(source: Source, size: int = 8) -> list[list[tuple[int, int]]]:
    """Each sample once, in epoch 3."""
    places = [(3, sample) for sample in range(len(source.names))]
    return [places[start : start + size] for start in range(0, len(places), size)]


def images(filled: list[Filled]) -> np.ndarray:
    return np.concatenate([batch.image.numpy() for batch in filled])


def by_cpu(source: Source, augmentation: Augmentation = AUGMENTATION) -> list[np.ndarray | None]:
    """The CPU path's views of epoch 3; None where it refuses the image."""
    views: list[np.ndarray | None] = []
    for sample in range(len(source.names)):
        try:
            image = decode(source.read(sample), augmentation.channels)
        except UnreadableImage:
            views.append(None)
            continue
        views.append(augment(image, sample_key(SEED, 3, sample), augmentation))
    return views


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int64) - b).mean())


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


def encoded(picture: np.ndarray, file_format: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def picture(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    resized = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


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
    assert tested.prepare(3, 0).data  # DALI's, and not decoded by us


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
    monkeypatch.setattr(tested, "_suits_dali", lambda data, header: True)
    offender = list(source.names).index(name)
    place = dali._Sample(3, offender, source.read(offender), 1, (0, 0, 130, 90))
    prepare = tested.prepare
    monkeypatch.setattr(
        tested,
        "prepare",
        lambda epoch, sample: (
            place
            if (sample, bool(tested.made_here)) == (offender, False)
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
        assert tested.made_here == {offender}


@needs_dali
def test_a_machine_that_fails_is_not_the_images_fault(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(jpegs))
    tested = pipeline(source, micro_batch=4)
    monkeypatch.setattr(tested, "_compare", lambda decoder: frozenset({1}))

    def fail(*_: object) -> None:
        raise RuntimeError("Critical error in pipeline:\nout of memory\n")

    monkeypatch.setattr(dali._Decoder, "collect", fail)
    made = tested.batches(every(source, 4))
    views = by_cpu(source)
    for start in (0, 4):
        np.testing.assert_array_equal(np.stack(views[start : start + 4]), next(made).image)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"batch after batch \(out of memory\).*data.backend=cpu"):
        next(made)


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

    monkeypatch.setattr(dali, "decode", turned_otherwise)
    next(tested.batches(every(source)))
    assert tested._orientations == {1}
    assert len(said) == 1
    monkeypatch.setattr(dali, "decode", lambda *_, **__: real(dali._probe(1), 3)[::-1].copy())
    with pytest.raises(DataError, match="DALI's pixels differ"):
        next(pipeline(source).batches(every(source)))


@needs_dali
def test_a_small_budget_cuts_batches_and_changes_nothing(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(jpegs))
    scheduled: list[int] = []
    schedule = dali._Decoder.schedule

    def counted(decoder: dali._Decoder, samples: list) -> None:
        assert sum(s.pixels for s in samples) <= decoder.owner.sub_batch_pixels or len(samples) == 1
        scheduled.append(len(samples))
        schedule(decoder, samples)

    monkeypatch.setattr(dali._Decoder, "schedule", counted)
    plenty = pipeline(source, micro_batch=24)
    whole = images(list(plenty.batches(every(source, 24))))
    assert max(scheduled) == len(source.names)
    scheduled.clear()
    little = pipeline(source, micro_batch=24)
    little.sub_batch_pixels = 600_000
    parts = images(list(little.batches(every(source, 24))))
    assert max(scheduled) < 12
    np.testing.assert_array_equal(whole, parts)


@needs_dali
def test_an_image_too_large_for_the_budget_is_decoded_here(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(encoded(picture(1200, 1300), "JPEG"))
    source = open_source(str(tmp_path))
    least = estimate_bytes(dali.MIN_PIXELS, AUGMENTATION, micro_batch=8, threads=2)
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
    assert largest_sub_batch(least, AUGMENTATION, micro_batch=64, threads=4) >= dali.MIN_PIXELS
    with pytest.raises(DataError):
        largest_sub_batch(least - 2**20, AUGMENTATION, micro_batch=64, threads=4)


@pytest.mark.parametrize("memory_bytes", [2**28, 2**30, 2**34])
def test_the_estimate_fills_the_budget_and_stays_within(memory_bytes: int) -> None:
    pixels = largest_sub_batch(memory_bytes, AUGMENTATION, micro_batch=64, threads=4)
    estimate = estimate_bytes(pixels, AUGMENTATION, micro_batch=64, threads=4)
    assert 0.98 * memory_bytes < estimate <= memory_bytes


def test_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    dali._import_dali.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    try:
        assert dali.missing_reason()
        name, reason = choose_backend("auto", cuda)
        assert name == "cpu"
        assert "NVIDIA DALI is missing (" in reason
        with pytest.raises(DataError, match=r"pip install 'simmim\[dali\]' \(.*nvidia.dali.*\)$"):
            choose_backend("dali", CPU)
        name, reason = choose_backend("auto", CPU)
        assert name == "cpu"
        assert "CUDA" in reason
        assert choose_backend("cpu", cuda)[0] == "cpu"
        with pytest.raises(DataError, match=r"1 or 3 channels, not 4; use data\.backend=cpu"):
            choose_backend("dali", CPU, channels=4)
        name, reason = choose_backend("auto", cuda, channels=12)
        assert name == "cpu"
        assert "not 12" in reason
    finally:
        dali._import_dali.cache_clear()


@needs_dali
def test_choice_of_dali() -> None:
    for requested, device in (("auto", torch.device("cuda")), ("dali", CPU)):
        name, reason = choose_backend(requested, device, channels=1)
        assert name == "dali"
        assert reason.startswith("DALI ")


class Slow:
    """A source that stops to answer after some reads, until `go_on` is set."""

    def __init__(self, source: Source, answers: int) -> None:
        self.source, self.names, self.left = source, source.names, answers
        self.go_on = threading.Event()

    def read(self, index: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            self.go_on.wait()
        return self.source.read(index)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before
    until = time.monotonic() + 120  # the kernel may show one that was joined a little longer
    while names := dalis_threads():
        assert time.monotonic() < until, names
        time.sleep(0.01)


def dalis_threads() -> list[str]:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text())
    return [name for name in names if "DALI" in name]


@needs_dali
@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_the_consumer_leaves_no_thread(jpegs: Path, error: type[BaseException]) -> None:
    source = open_source(str(jpegs))
    endless = chain.from_iterable([every(source)] * 100)

    def train() -> None:
        with closing(pipeline(source).batches(endless)) as made:
            for number, _ in enumerate(made):
                assert dalis_threads()
                if number == 3:
                    raise error

    with pytest.raises(error):
        train()


@needs_dali
@pytest.mark.usefixtures("no_thread_stays")
def test_an_error_of_the_machine_reaches_the_consumer(jpegs: Path) -> None:
    source = open_source(str(jpegs))

    class OutOfDescriptors:
        names = source.names

        def read(self, index: int) -> bytes:
            if index == 11:
                raise OSError(errno.EMFILE, "Too many open files")
            if index == 2:
                raise OSError(errno.EIO, "Input/output error")
            return source.read(index)

    made = pipeline(OutOfDescriptors()).batches(every(source))
    assert next(made).problems == [(2, "Input/output error")]
    with pytest.raises(OSError, match="Too many open files"):
        next(made)


@needs_dali
def test_a_read_that_hangs_does_not_hang_the_close(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali, "CLOSE_S", 0.2)
    source = Slow(open_source(str(jpegs)), answers=16)
    made = pipeline(source).batches(every(source))
    next(made)
    hanging = [t for t in threading.enumerate() if t.name.startswith("simmim-read")]
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 300  # and not for ever
    source.go_on.set()
    for thread in hanging:
        assert thread.daemon
        thread.join(300)
        assert not thread.is_alive()


@needs_dali
@pytest.mark.usefixtures("no_thread_stays")
def test_a_read_that_hangs_is_given_up(jpegs: Path) -> None:
    source = Slow(open_source(str(jpegs)), answers=5)
    said: list[str] = []
    made = pipeline(source, threads=1, timeout_s=1.0, report=said.append).batches(every(source)[:1])
    filled = next(made)
    source.go_on.set()
    made.close()
    assert "no answer" in filled.problems[0][1]
    assert 1 <= len(said) == len(filled.problems)
    assert not filled.image[filled.problems[0][0]].any()
    assert filled.image[0].any()


MEMORY_TREND = """
import io, sys, numpy as np, torch
from PIL import Image
from simmim.data.augment import Augmentation
from simmim.data.dali import DaliPipeline, missing_reason
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
