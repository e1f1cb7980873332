"""The data path: every kind of file, broken ones, tar shards, samples that follow their key."""

import errno
import io
import multiprocessing
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from simmim.data.augment import Augmentation, augment, centre_view, crop_box, sample_key
from simmim.data.batch import Batch
from simmim.data.decode import UnreadableImage, decode, read_header
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.data.order import MicroBatches, SampleOrder
from simmim.data.shards import ShardSource
from simmim.data.source import PackedStrings, Source
from simmim.data.views import CroppedView
from simmim.distributed import World
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.pack import pack
from simmim.training.interrupts import StopWaiting
from simmim_kernels import native

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


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {}),
        ("grey.jpeg", "L", {}),
        ("cmyk.JPG", "CMYK", {}),
        ("deep/er/b.png", "RGB", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
        ("grey_alpha.png", "LA", {}),
        ("bilevel.png", "1", {}),
        ("c.webp", "RGB", {}),
        ("d.bmp", "RGB", {}),
        ("e.tiff", "RGB", {}),
        ("f.gif", "P", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_file(
    write_image: Callable[..., Path], name: str, mode: str, options: dict, channels: int
) -> None:
    path = write_image(name, mode, **options)
    source = open_source(str(path.parents[len(Path(name).parts) - 1]))
    assert list(source.names) == [name]
    image = decode(source.read(0), channels)
    assert image.shape == (70, 90, channels)
    assert image.dtype == np.uint8


def test_exif_rotation(write_image: Callable[..., Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    path = write_image("turned.jpg", exif=exif)
    assert decode(path.read_bytes(), 3).shape == (90, 70, 3)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("where", ["exif", "xmp", "both"])
def test_headers_and_pixels_are_pillows(
    write_image: Callable[..., Path], orientation: int, where: str
) -> None:
    """Every orientation, valid or not, told by EXIF, by XMP, or by both and differently."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    options = {}
    if where != "xmp":
        exif[0x0112] = orientation
    if where != "exif":
        told = orientation if where == "xmp" else 3
        options["xmp"] = f'<x:xmpmeta tiff:Orientation="{told}"></x:xmpmeta>'.encode()
    data = write_image("turned.jpg", size=(50, 30), exif=exif, **options).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(data, 3), expected)
    header = read_header(data)
    assert (header.width, header.height, header.channels, header.format) == (50, 30, 3, "JPEG")
    assert header.upright_size == expected.shape[1::-1]


def test_jpegs_of_every_kind_have_pillows_pixels(write_image: Callable[..., Path]) -> None:
    kinds: list[dict] = [
        {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
        {"quality": 30}, {"mode": "L"}, {"keep_rgb": True}, {"restart_marker_rows": 1},
    ]  # fmt: skip
    for kind in kinds:
        data = write_image("x.jpg", **kind).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB"))
        assert read_header(data).plain
        assert np.array_equal(decode(data, 3), expected), kind


def test_sixteen_bit_png_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = decode((tmp_path / "deep.png").read_bytes(), 3)
    assert pixels[0, 0, 0] == 0
    assert pixels[-1, -1, 0] == 255
    assert abs(int(pixels[32, 0, 0]) - 128) <= 1


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "header"])
def test_broken_files_are_named(write_image: Callable[..., Path], damage: str) -> None:
    data = write_image("x.jpg", size=(200, 200)).read_bytes()
    broken = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "text": b"<html>not found</html>",
        "header": data[:20] + bytes(len(data) - 20),
    }[damage]
    with pytest.raises(UnreadableImage):
        decode(broken, 3)


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


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.jpg").write_text("x")
    with pytest.raises(DataError, match=f"{tmp_path}: no image"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(str(tmp_path / "missing"))


@pytest.fixture
def shards(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    files = sorted(photos.iterdir())
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for path in files[number::2]:
                archive.add(path, f"./{path.name}")
            archive.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    return folder


def test_tar_shards_hold_the_same_bytes(photos: Path, shards: Path) -> None:
    source = open_source(str(shards))
    assert len(source.names) == len(list(photos.iterdir()))
    for index, name in enumerate(source.names):
        assert source.read(index) == (photos / name.split("/", 1)[1]).read_bytes()
    again = open_source(str(shards))  # from the cached index
    assert list(again.names) == list(source.names)
    assert again.read(3) == source.read(3)


def test_a_changed_shard_is_indexed_anew(photos: Path, shards: Path) -> None:
    before = len(open_source(str(shards / "0.tar")).names)
    with tarfile.open(shards / "0.tar", "a") as archive:
        archive.add(min(photos.iterdir()), "extra.jpg")
    assert len(open_source(str(shards / "0.tar")).names) == before + 1


def test_wrong_shards(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(DataError, match=r"text\.tar: not a readable tar file"):
        open_source(str(tmp_path / "text.tar"))
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(min(photos.iterdir()), "a.jpg")
    with pytest.raises(DataError, match="compressed shards have no random access"):
        open_source(str(tmp_path / "packed.tar"))


def test_a_truncated_shard_is_an_unreadable_image(shards: Path) -> None:
    source = ShardSource([shards / "0.tar"])
    os.truncate(shards / "0.tar", (shards / "0.tar").stat().st_size // 2)
    with pytest.raises(OSError, match="the shard ends inside this image"):
        [source.read(index) for index in range(len(source.names))]


def test_a_shard_cut_off_before_it_was_indexed(shards: Path) -> None:
    whole = len(open_source(str(shards / "0.tar")).names)
    os.truncate(shards / "0.tar", (shards / "0.tar").stat().st_size // 2)
    source = open_source(str(shards / "0.tar"))
    assert 0 < len(source.names) < whole
    assert source.read(0)
    with pytest.raises(OSError, match="the shard ends inside this image"):
        source.read(len(source.names) - 1)


def test_more_shards_than_descriptors(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simmim.data.shards.MAX_OPEN_SHARDS", 2)
    for number, path in enumerate(sorted(photos.iterdir())[:5]):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            archive.add(path, path.name)
    source = open_source(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for index in [0, 1, 2, 3, 4, 0, 3, 1]:
        expected = photos / source.names[index].split("/", 1)[1]
        assert source.read(index) == expected.read_bytes()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_threads_share_few_descriptors(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread's shard is closed for another's while it is read: no bytes of another file."""
    monkeypatch.setattr("simmim.data.shards.MAX_OPEN_SHARDS", 2)
    for number in range(8):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            member = tarfile.TarInfo("a.jpg")
            member.size = 200_000
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
    source = open_source(str(tmp_path))

    def read(number: int) -> bool:
        return source.read(number % 8) == bytes([number % 8]) * 200_000

    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(4000)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_no_descriptors_left_is_not_a_broken_image(photos: Path) -> None:
    source = open_source(str(photos))

    def refuse(index: int) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    source.read = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Too many open files"):
        list(loader(source).steps(0, 1))


def test_links(photos: Path, tmp_path: Path) -> None:
    """Linked files and folders are followed, circles are not, and a dead link is one bad image."""
    folder = tmp_path / "links"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "circle").symlink_to(folder)
    (folder / "elsewhere").symlink_to(photos)
    (folder / "dead.jpg").symlink_to("nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    source = open_source(str(folder))
    assert len(source.names) == 2 + len(list(photos.iterdir()))
    for name, reason in (("dead.jpg", "No such file"), ("pipe.jpg", "not a regular file")):
        with pytest.raises(OSError, match=reason):
            source.read(list(source.names).index(name))


def test_a_run_among_the_photos_adds_none(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(min(photos.iterdir()).read_bytes())
    pictures = tmp_path / "runs" / "mine" / "pictures"
    pictures.mkdir(parents=True)
    (pictures / "step_1.png").write_bytes(b"x")
    for name in (".lock", "run.json"):
        (tmp_path / "runs" / "mine" / name).touch()
    assert list(open_source(str(tmp_path)).names) == ["photo.jpg"]


def test_packed_strings() -> None:
    names = ["a", "", "ü/ß.jpg", "\udcff.png"]
    packed = PackedStrings(names)
    assert list(packed) == names
    assert packed.digest() != PackedStrings(["a", "ü/ß.jpg", "", "\udcff.png"]).digest()
    assert PackedStrings([]).digest()


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


def test_order_visits_everything_once_an_epoch() -> None:
    order = SampleOrder(10, seed=3)
    places = [order.at(p) for p in range(30)]
    epochs = [[sample for epoch, sample in places if epoch == e] for e in range(3)]
    assert all(sorted(samples) == list(range(10)) for samples in epochs)
    assert epochs[0] != epochs[1]
    assert [SampleOrder(10, 3).at(p) for p in range(30)] == places
    assert [SampleOrder(10, 4).at(p) for p in range(30)] != places
    assert len(MicroBatches(order, 3, 2, 0, 1, 2, 5)) == 6


def test_crop_boxes_follow_the_paper() -> None:
    shares, ratios, corners = [], [], set()
    for key in range(4000):
        left, top, w, h = crop_box(sample_key(0, 0, key), 200, 200, (0.67, 1.0), (3 / 4, 4 / 3))
        assert 0 <= left <= 200 - w
        assert 0 <= top <= 200 - h
        shares.append(w * h / 200**2)
        ratios.append(w / h)
        corners.add((left, top))
    assert 0.66 < min(shares) < 0.68
    assert 0.95 < max(shares) <= 1.0
    assert min(ratios) > 0.66
    assert max(ratios) < 1.51
    assert abs(np.mean(np.log(ratios))) < 0.01
    assert len(corners) > 500


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (300, 3), (64, 64)])
def test_crop_of_odd_images(size: tuple[int, int]) -> None:
    left, top, w, h = crop_box(7, *size, (0.67, 1.0), (3 / 4, 4 / 3))
    assert w >= 1
    assert h >= 1
    assert left + w <= size[0]
    assert top + h <= size[1]
    image = np.full((size[1], size[0], 3), (10, 20, 30), np.uint8)
    assert augment(image, 7, AUGMENTATION).shape == (32, 48, 3)
    assert centre_view(image, (32, 48)).shape == (32, 48, 3)


@pytest.mark.parametrize("extension", ["native", "missing"])
def test_augmentation_is_crop_resize_flip(
    photos: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same box through Pillow by hand gives the same pixels; half of the views are flipped."""
    if extension == "missing":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip(str(native.missing_reason))
    pixels = decode(min(photos.iterdir()).read_bytes(), 3)
    image = Image.fromarray(pixels)
    flipped = 0
    for sample in range(200):
        key = sample_key(5, 0, sample)
        left, top, w, h = crop_box(key, *image.size, (0.67, 1.0), (3 / 4, 4 / 3))
        crop = image.crop((left, top, left + w, top + h))
        # rows first, as Pillow itself does before release 13
        rows = crop.resize((48, h), Image.Resampling.BILINEAR)
        plain = np.asarray(rows.resize((48, 32), Image.Resampling.BILINEAR))
        view = augment(pixels, key, AUGMENTATION)
        if np.array_equal(view, plain[:, ::-1]):
            flipped += 1
        else:
            assert np.array_equal(view, plain)
    assert 70 < flipped < 130
