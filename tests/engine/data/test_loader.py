"""Steps of batches: the same samples for any workers and ranks, broken images, signals."""

import errno
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simmim.data import loader as loader_module
from simmim.data.augment import Augmentation
from simmim.data.batch import Batch
from simmim.data.loader import Loader, default_workers
from simmim.data.open import open_source
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.producer import Filled, InlineProducer, SourceSamples
from simmim.data.source import Source
from simmim.data.views import CroppedView
from simmim.data.workers import WorkerPool
from simmim.distributed import World
from simmim.environment import Launch
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.pack import pack
from simmim.training.interrupts import StopWaiting
from stand_in_images import StandInSource, StandInView

AUGMENTATION = Augmentation((32, 48), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3)
BROKEN = {"zero.jpg": 0, "cut.jpg": 300}
HERE = World(0, 1, torch.device("cpu"))


def loader(source: Source, **options: object) -> Loader:
    settings: dict = {
        "seed": 1,
        "micro_batch": 4,
        "accumulation_steps": 1,
        "workers": 0,
        "prefetch": 2,
        "world": HERE,
    } | options
    return Loader(source, CroppedView(AUGMENTATION, settings["seed"]), **settings)


def stand_in(count: int, broken: Iterable[int] = (), **options: Any) -> Loader:
    """A loader of images without pixels; see stand_in_images.py."""
    settings = {
        "seed": 1, "micro_batch": 4, "accumulation_steps": 1, "workers": 0, "prefetch": 2,
        "world": HERE,
    } | options  # fmt: skip
    return Loader(StandInSource(count, set(broken)), StandInView(), **settings)


def test_broken_images_leave_empty_slots(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted(photos.iterdir())[:5]
    for path in good:
        (folder / path.name).write_bytes(path.read_bytes())
    for name, length in BROKEN.items():
        (folder / name).write_bytes(good[0].read_bytes()[:length])
    seen: list[int] = []
    source = open_source(str(folder))
    mixed = loader(source)
    batches = [b for step in mixed.steps(0, 7) for b in step]
    for batch in batches:
        empty = batch.ids < 0
        assert batch.num_valid == int((~empty).sum())
        assert (batch.image[empty] == 0).all()
        assert all(image.float().std() > 0 for image in batch.image[~empty])
        seen += batch.ids[~empty].tolist()
    # 28 slots over 7 images: four epochs, every readable image once in each
    broken = [i for i, name in enumerate(source.names) if name in BROKEN]
    assert sorted(seen) == sorted(i for i in range(7) if i not in broken for _ in range(4))
    assert sorted(sample for sample, _ in mixed.problems) == sorted(4 * broken)
    assert all(reason for _, reason in mixed.problems)


def test_all_broken_is_an_error(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="could all not be read"):
        list(loader(open_source(str(tmp_path))).steps(0, 10))


def test_rare_broken_images_never_end_a_run() -> None:
    """Two of ten, for fifteen epochs: thirty in all, and never ten in a row."""
    images = stand_in(10, broken={3, 4}, micro_batch=1)
    assert sum(batch.num_valid for (batch,) in images.steps(0, 150)) == 15 * 8
    assert len(images.problems) == 30


def test_one_good_image_in_a_batch_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "MAX_UNREADABLE_IN_A_ROW", 4)
    images = stand_in(4, broken={0, 1, 2})
    assert [batch.num_valid for (batch,) in images.steps(0, 5)] == [1] * 5


@pytest.mark.parametrize(("count", "limit", "said"), [(100, 5, 6), (7, 1000, 8), (8, 1000, 8)])
def test_a_run_ends_where_so_many_in_a_row_are_unreadable(
    count: int, limit: int, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand, or every image of a smaller source; told by the batch that is the last."""
    monkeypatch.setattr(loader_module, "MAX_UNREADABLE_IN_A_ROW", limit)
    images = stand_in(count, broken=range(count), micro_batch=2)
    last = SampleOrder(count, 1).at(said - 2)[1]
    reason = rf"the last {said} images could all not be read \({last}.jpg: {last} is broken\)"
    with pytest.raises(DataError, match=reason):
        list(images.steps(0, 100))
    assert len(images.problems) == said


def test_an_empty_slot_has_no_id_and_zeros() -> None:
    images = stand_in(6, broken={2, 5}, seed=4)
    ((batch,),) = images.steps(3, 4)
    places = [SampleOrder(6, 4).at(position) for position in range(12, 16)]
    read = [sample not in (2, 5) for _, sample in places]
    assert 0 < sum(read) < 4
    assert batch.ids.tolist() == [s if good else -1 for (_, s), good in zip(places, read)]
    assert batch.epochs.tolist() == [epoch for epoch, _ in places]
    assert batch.image.tolist() == [
        [1 + s, e, s] if good else [0, 0, 0] for (e, s), good in zip(places, read)
    ]
    assert batch.num_valid == sum(read)
    lost = [s for (_, s), good in zip(places, read) if not good]
    assert images.problems == [(s, f"{s} is broken") for s in lost]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_takes_its_own_part_from_the_step_on(rank: int) -> None:
    world = World(rank, 3, torch.device("cpu"))
    images = stand_in(50, seed=8, micro_batch=2, accumulation_steps=2, world=world)
    steps = list(images.steps(7, 10))
    assert [len(step) for step in steps] == [2, 2, 2]
    found = [
        list(zip(batch.epochs.tolist(), batch.ids.tolist())) for step in steps for batch in step
    ]
    assert found == list(MicroBatches(SampleOrder(50, 8), 2, 2, rank, 3, 7, 10))


def test_a_batch_stays_when_the_next_is_made() -> None:
    """The producer writes to the same memory again."""
    memory = torch.zeros(4, 3)

    class Reusing:
        def batches(self, places: Iterable[object]) -> Iterator[Filled]:
            for number, _ in enumerate(places):
                yield Filled(memory.fill_(number), [])

    images = stand_in(9, producer=Reusing())
    batches = [batch for (batch,) in images.steps(0, 3)]
    assert [batch.image.unique().tolist() for batch in batches] == [[0], [1], [2]]


def test_what_workers_are_told() -> None:
    images = stand_in(9, micro_batch=5, workers=3, prefetch=6, timeout_s=33)
    workers = images.producer
    assert isinstance(workers, WorkerPool)
    assert (workers.micro_batch, workers.workers, workers.prefetch) == (5, 3, 6)
    assert (workers.timeout_s, workers.pin) == (33, False)
    assert isinstance(workers.samples, SourceSamples)
    assert workers.samples.source is images.source
    lines: list[str] = []
    images.report = lines.append  # set by the run, after the loader was made
    workers.report("a worker died")
    assert lines == ["a worker died"]


def test_who_decodes() -> None:
    assert isinstance(stand_in(9, workers=0).producer, InlineProducer)
    assert stand_in(9, workers=-1).workers == default_workers(HERE)
    made = InlineProducer(SourceSamples(StandInSource(9), StandInView()))
    given = stand_in(9, workers=2, producer=made)
    assert given.producer is made
    assert given.kind_of_workers == "threads (DALI)"
    assert stand_in(9, workers=2).kind_of_workers == "workers"


@pytest.mark.parametrize(
    ("device", "cores", "workers"),
    [
        ("cpu", 1, 0),
        ("cpu", 2, 1),
        ("cpu", 64, 1),
        ("cuda", 1, 1),
        ("cuda", 6, 5),
        ("cuda", 64, 16),
    ],
)
def test_default_workers_share_the_cores(
    device: str, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "cores", cores)
    assert default_workers(World(0, 1, torch.device(device))) == workers


def test_the_wait_for_data_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.5, 10.0, 12.0])
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    images = stand_in(9)
    seen: list[bool] = []
    fill = images.producer.batches

    def noted(places: Iterable[list[tuple[int, int]]]) -> Iterator[Filled]:
        for filled in fill(places):
            seen.append(images.waiting)
            yield filled

    images.producer.batches = noted  # type: ignore[method-assign, assignment]
    assert [images.waiting for _ in images.steps(0, 2)] == [False, False]
    assert seen == [True, True]
    assert images.wait_s == 3.5


@pytest.mark.parametrize("how", ["the end", "leaving early", "a failure"])
def test_the_producer_ends_with_the_loop(how: str) -> None:
    ended: list[bool] = []

    class Noted:
        def batches(self, places: Iterable[object]) -> Iterator[Filled]:
            try:
                for number, _ in enumerate(places):
                    if number == 1 and how == "a failure":
                        raise DataError("no disk")
                    yield Filled(torch.zeros(4, 3), [])
            finally:
                ended.append(True)

    images = stand_in(9, producer=Noted())
    steps = images.steps(0, 2)
    next(steps)
    assert not ended
    if how == "a failure":
        with pytest.raises(DataError, match="no disk"):
            next(steps)
    elif how == "leaving early":
        steps.close()
    else:
        assert len(list(steps)) == 1
    assert ended == [True]
    assert not images.waiting


def test_no_descriptors_left_is_not_a_broken_image(photos: Path) -> None:
    source = open_source(str(photos))

    def refuse(index: int) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    source.read = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Too many open files"):
        list(loader(source).steps(0, 1))


def collect(batches: list[Batch]) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (int(e), int(i)): image
        for b in batches
        for e, i, image in zip(b.epochs, b.ids, b.image, strict=True)
    }


@pytest.mark.parametrize(
    ("workers", "ranks", "accumulation"), [(2, 1, 1), (0, 2, 1), (1, 2, 2), (0, 4, 1)]
)
def test_same_samples_for_any_workers_and_ranks(
    photos: Path, workers: int, ranks: int, accumulation: int
) -> None:
    source = open_source(str(photos))
    steps, batch_size = 8, 8  # 64 samples of 24 photos: batches that span epochs
    expected = list(loader(source, micro_batch=batch_size).steps(0, steps))
    parts = [
        list(
            loader(
                source,
                micro_batch=batch_size // ranks // accumulation,
                accumulation_steps=accumulation,
                workers=workers,
                world=World(rank, ranks, torch.device("cpu")),
            ).steps(0, steps)
        )
        for rank in range(ranks)
    ]
    for step in range(steps):
        whole = collect(expected[step])
        found = collect([batch for part in parts for batch in part[step]])
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_signal_while_waiting_is_silent(
    photos: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """StopWaiting breaks into a read of the processes' answers: nothing stays, nothing is said."""
    monkeypatch.setattr("simmim.data.workers.wait", raise_stop_waiting)
    with pytest.raises(StopWaiting):
        next(loader(open_source(str(photos)), workers=1).steps(0, 3))
    assert capfd.readouterr().err == ""
    assert not multiprocessing.active_children()


def test_a_signal_while_an_image_is_decoded_is_no_unreadable_image(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it trains on zeros in that place, and ends unlike an unbroken run."""
    for decoder in ("_decode_jpeg", "_decode_other"):
        monkeypatch.setattr(f"simmim.data.decode.{decoder}", raise_stop_waiting)
    with pytest.raises(StopWaiting):
        next(loader(open_source(str(photos)), workers=0).steps(0, 1))


def raise_stop_waiting(*arguments: object, **named: object) -> list[object]:
    raise StopWaiting


@pytest.mark.parametrize(
    ("workers", "cores", "remedy"),
    [
        (0, 8, "try --data.workers=1"),
        (2, 8, "try --data.workers=7"),
        (7, 8, "`simmim pack`"),
    ],
)
def test_remedies(
    photos: Path, monkeypatch: pytest.MonkeyPatch, workers: int, cores: int, remedy: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert remedy in loader(open_source(str(photos)), workers=workers).remedy()


def test_packed_images_are_not_told_to_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "cores", 3)
    images = stand_in(9, workers=3)
    images.source.sizes = [(32, 32)] * 9  # type: ignore[attr-defined]
    assert "docs/feed-eight-gpus.md" in images.remedy()
    assert "data.workers" not in stand_in(9, workers=2).remedy()  # one core is the run's own
    monkeypatch.setattr(Launch, "cores", 1)
    assert "data.workers" not in stand_in(9, workers=0).remedy()


@pytest.mark.parametrize("kind", ["folder", "tar", "packed"])
def test_starting_later_is_the_same_run(
    photos: Path, shards: Path, tmp_path: Path, kind: str
) -> None:
    """Mid-epoch, with other workers, whatever holds the images."""
    paths = {"folder": photos, "tar": shards, "packed": tmp_path / "packed"}
    if kind == "packed":
        pack(open_source(str(photos)), paths[kind], Options(images_per_shard=7))
    source = open_source(str(paths[kind]))
    whole = list(loader(source).steps(0, 9))
    rest = list(loader(source, workers=2).steps(5, 9))
    ids = [int(i) for (batch,) in whole for i in batch.ids]
    assert sorted(ids[: len(source.names)]) == list(range(len(source.names)))  # one epoch
    for (a,), (b,) in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.ids, b.ids)
