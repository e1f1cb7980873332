"""Steps of batches: the same samples for any workers and ranks, broken images, signals."""

import errno
import multiprocessing
from pathlib import Path

import pytest
import torch

from simmim.data.augment import Augmentation
from simmim.data.batch import Batch
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.data.views import CroppedView
from simmim.distributed import World
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.pack import pack
from simmim.training.interrupts import StopWaiting

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
