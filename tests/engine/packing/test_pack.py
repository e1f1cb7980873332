"""`simmim pack`: every kind of source and reader, what is skipped, packs killed at any moment."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from simmim.cli import main
from simmim.commands import pack as pack_command
from simmim.data.decode import UnreadableImage, decode
from simmim.data.folder import FolderSource
from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.shards import ShardSource, scan_tar
from simmim.data.source import Source
from simmim.errors import DataError, RunError
from simmim.packing import encode as encoding
from simmim.packing import parquet, plan
from simmim.packing.encode import Encoded, encode
from simmim.packing.options import Options
from simmim.packing.pack import claimed, pack
from simmim.packing.verify import verify

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 photos in two class folders: JPEGs below and above 64 pixels, a PNG, a turned JPEG."""
    root = tmp_path_factory.mktemp("small")
    for number, path in enumerate(sorted(photos.iterdir())[:12]):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        with Image.open(path) as image:
            side = 40 + 20 * number
            image.convert("RGB").resize((side + 9, side)).save(folder / f"{number:02d}.jpg")
            if number == 3:
                image.convert("RGB").resize((50, 60)).save(folder / "small.png")
            if number == 4:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.convert("RGB").resize((55, 45)).save(folder / "turned.jpg", exif=exif)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def run(*arguments: object) -> int:
    return main(["pack", *map(str, arguments)])


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "source\treason"
    return dict(line.split("\t") for line in lines[1:])


def index_of(folder: Path, shard: int = 0) -> dict[str, Any]:
    return dict(json.loads((folder / f"{shard:06d}.json").read_text()))


def test_a_folder(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "packed"
    assert run(small, folder, "--short-side", 64, "--images-per-shard", 5) == 0
    before = FolderSource(small)
    source = open_source(str(folder))
    assert isinstance(source, ShardSource)
    assert len(source.names) == len(before.names) == 14
    assert source.sizes is not None
    rows = [(index_of(folder, s), r) for s in range(3) for r in range(5 if s < 2 else 4)]
    kept = 0
    for number, (index, row) in enumerate(rows):
        data, original = source.read(number), before.read(number)
        assert index["source"][row] == before.names[number]
        assert source.names[number].endswith(f"/{number:08d}.jpg")
        assert hashlib.sha256(data).hexdigest() == index["sha256"][row]
        pixels, whole = decode(data, None), decode(original, None)
        assert pixels.shape[1::-1] == tuple(source.sizes[number])
        assert min(pixels.shape[:2]) == min(64, *whole.shape[:2])
        assert abs(pixels.shape[1] / pixels.shape[0] - whole.shape[1] / whole.shape[0]) < 0.02
        kept += data == original
        if data != original:
            size = pixels.shape[1::-1]
            smaller = np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.LANCZOS))
            assert data == simplejpeg.encode_jpeg(smaller, 90, "RGB", "420")
    sizes = [decode(p.read_bytes(), 3).shape[:2] for p in small.rglob("[0-9]*.jpg")]
    assert kept == sum(min(size) <= 64 for size in sizes) > 0
    labels = labels_of(source)
    assert labels is not None
    assert labels.classes == ("cat", "dog")
    assert labels.values.tolist() == [int(n.startswith("dog")) for n in before.names]
    dataset = json.loads((folder / "dataset.json").read_text())
    for name, value in {"images": 14, "shards": 3, "channels": 3, "skipped": 0}.items():
        assert dataset[name] == value
    printed = capsys.readouterr().out
    bytes_before = sum(p.stat().st_size for p in small.rglob("*.*"))
    assert f"14 images in 3 shards, {bytes_before / 1000:.1f} kB → " in printed
    assert "skipped" not in printed
    assert skipped(folder) == {}
    assert run("--verify", folder) == 0
    assert "14 images, all sound" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--shuffle", 3), ("--keep-originals",)])
def test_same_bytes_for_any_number_of_workers(
    small: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    for workers in (1, 2, 5):
        done = run(small, tmp_path / str(workers), "--images-per-shard", 3, "--workers", workers,
                   *options)  # fmt: skip
        assert done == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_the_default_makes_shards_for_many_processes(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    for number in range(300):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(buffer.getvalue())
    assert run(tmp_path / "photos", tmp_path / "packed") == 0
    assert [len(index_of(tmp_path / "packed", shard)["name"]) for shard in (0, 1)] == [256, 44]


def test_read_by_tar_and_by_a_plain_scan(small: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "packed", tmp_path / "out"
    out.mkdir()
    assert run(small, folder) == 0
    subprocess.run(["tar", "-xf", folder / "000000.tar", "-C", out], check=True)
    source = ShardSource([folder / "000000.tar"])
    assert len(source.names) == 14
    for number, name in enumerate(source.names):
        path = out / name.split("/")[1]
        assert path.read_bytes() == source.read(number)
        assert path.with_suffix(".cls").read_text() == str(int(number >= 7))
    assert source.labels is not None
    assert source.labels.values.tolist() == [0] * 7 + [1] * 7


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_read_by_webdataset(small: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    assert run(small, tmp_path / "packed", "--images-per-shard", 5) == 0
    source = open_source(str(tmp_path / "packed"))
    urls = sorted(str(p) for p in (tmp_path / "packed").glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("jpg", "cls"))
    assert [label for _, label in samples] == [0] * 7 + [1] * 7
    raw = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["jpg"] for sample in raw] == [source.read(i) for i in range(14)]


def test_read_by_dali(small: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    folder = tmp_path / "packed"
    assert run(small, folder, "--images-per-shard", 5) == 0
    source = open_source(str(folder))

    @dali.pipeline_def(batch_size=14, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        jpeg, label = dali.fn.readers.webdataset(
            paths=sorted(str(p) for p in folder.glob("*.tar")),
            index_paths=sorted(str(p) for p in folder.glob("*.idx")),
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        return jpeg, label, dali.fn.decoders.image(jpeg, device="cpu")

    built = pipeline()
    built.build()
    jpeg, label, pixels = built.run()
    for number in range(14):
        assert bytes(jpeg.at(number)) == source.read(number)
        assert bytes(label.at(number)) == str(int(number >= 7)).encode()
        expected = decode(source.read(number), 3).astype(int)
        assert np.abs(pixels.at(number).astype(int) - expected).mean() < 1


def test_the_index_is_that_of_dalis_own_tool(small: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    assert run(small, tmp_path / "packed") == 0
    with wds2idx.IndexCreator(
        str(tmp_path / "packed" / "000000.tar"), str(tmp_path / "theirs"), verbose=False
    ) as creator:
        creator.create_index()
    assert (tmp_path / "packed" / "000000.idx").read_text() == (tmp_path / "theirs").read_text()


@pytest.mark.parametrize(
    ("channels", "extension"), [(1, "jpg"), (2, "png"), (3, "jpg"), (4, "png"), (6, "npy")]
)
def test_every_number_of_channels(channels: int, extension: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 47, channels), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, pixels)
    whole = encode(file.getvalue(), Options())
    assert (whole.extension, whole.width, whole.height, whole.channels) == (
        extension, 47, 30, channels,
    )  # fmt: skip
    if extension != "jpg":
        assert np.array_equal(decode(whole.data, None), pixels)
    smaller = encode(file.getvalue(), Options(short_side=15))
    assert decode(smaller.data, None).shape == (15, 24, channels)


def test_quality_and_sides_beyond_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, noise)
    sizes = [len(encode(file.getvalue(), Options(quality=q)).data) for q in (10, 50, 90)]
    assert sizes == sorted(set(sizes))
    with Image.open(io.BytesIO(encode(file.getvalue(), Options()).data)) as image:
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    long = io.BytesIO()
    np.save(long, np.zeros((1, 70_000, 3), dtype=np.uint8))
    assert encode(long.getvalue(), Options()).extension == "png"


def test_keep_originals(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    with Image.open(min((small / "cat").iterdir())) as image:
        for name in ("a.jpg", "b.png", "c.webp", "d.tiff", "e.bmp"):
            image.save(root / name)
        image.save(root / "really_png.jpg", "PNG")
    (root / "cut.png").write_bytes((root / "b.png").read_bytes()[:500])
    assert run(root, tmp_path / "packed", "--keep-originals") == 0
    index = index_of(tmp_path / "packed")
    assert [n.split(".")[1] for n in index["name"]] == ["jpg", "png", "webp", "tif", "bmp", "png"]
    source = open_source(str(tmp_path / "packed"))
    for number, name in enumerate(index["source"]):
        assert source.read(number) == (root / name).read_bytes()
    assert list(skipped(tmp_path / "packed")) == ["cut.png"]
    assert run("--verify", tmp_path / "packed") == 0


def test_tars_and_packs_are_sources(small: Path, tmp_path: Path) -> None:
    assert run(small, tmp_path / "first", "--short-side", 64) == 0
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "x.tar").write_bytes((tmp_path / "first" / "000000.tar").read_bytes())
    options = ("--keep-originals", "--images-per-shard", 6)
    for name, source in (("a", "first"), ("b", "tars"), ("c", "tars/x.tar")):
        assert run(tmp_path / source, tmp_path / name, *options) == 0
        packed = open_source(str(tmp_path / name))
        first = open_source(str(tmp_path / "first"))
        assert [packed.read(i) for i in range(14)] == [first.read(i) for i in range(14)]
        labels = labels_of(packed)
        assert labels is not None
        assert labels.values.tolist() == [0] * 7 + [1] * 7
        assert labels.classes == (("cat", "dog") if name == "a" else ("0", "1"))


def test_a_label_file_and_a_shuffle(small: Path, tmp_path: Path) -> None:
    names = list(FolderSource(small).names)
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"{name},{number % 3}\n" for number, name in enumerate(names)))
    assert run(small, tmp_path / "packed", "--labels", table, "--shuffle", 8) == 0
    index = index_of(tmp_path / "packed")
    assert sorted(index["source"]) == names
    assert index["source"] != names
    assert index["label"] == [names.index(source) % 3 for source in index["source"]]
    assert run(small, tmp_path / "other", "--labels", table, "--shuffle", 9) == 0
    assert index_of(tmp_path / "other")["source"] != index["source"]


def test_what_is_skipped_and_why(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bad"
    root.mkdir()
    good = min((small / "cat").iterdir()).read_bytes()
    (root / "good.jpg").write_bytes(good)
    (root / "cut.jpg").write_bytes(good[:300])
    (root / "empty.jpg").touch()
    (root / "text\t\x1b[31m\n.jpg").write_text("no image")
    (root / "dead.jpg").symlink_to("nowhere")
    Image.new("L", (400, 300)).save(root / "large.png")
    assert run(root, tmp_path / "packed", "--max-pixels", 100_000) == 0
    reasons = skipped(tmp_path / "packed")
    assert set(reasons) == {
        "cut.jpg", "empty.jpg", r"text\t\x1b[31m\n.jpg", "dead.jpg", "large.png",
    }  # fmt: skip
    assert reasons["large.png"] == "too many pixels: 400×300"
    assert reasons["dead.jpg"] == "not read: No such file or directory"
    assert reasons["empty.jpg"].startswith("unreadable: ")
    assert "1 images in 1 shards" in (out := capsys.readouterr().out)
    assert "skipped 5 (3 unreadable, 1 not read, 1 too many pixels), see skipped.tsv" in out
    assert json.loads((tmp_path / "packed" / "dataset.json").read_text())["skipped"] == 5


def test_channels_for_all(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    with Image.open(min((small / "cat").iterdir())) as image:
        for mode in ("L", "RGB"):
            image.convert(mode).save(root / f"{mode}.jpg")
        image.convert("RGBA").save(root / "RGBA.png")
    assert run(root, tmp_path / "packed", "--channels", 3, "--stats") == 0
    source = open_source(str(tmp_path / "packed"))
    assert [decode(source.read(i), None).shape[2] for i in range(3)] == [3, 3, 3]
    assert source.read(1) == (root / "RGB.jpg").read_bytes()
    assert json.loads((tmp_path / "packed" / "dataset.json").read_text())["channels"] == 3
    assert run("--verify", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run(root, "--channels", 1, "--stats") == 0
    grey = [decode(p.read_bytes(), 1) for p in sorted(root.iterdir())]
    assert capsys.readouterr().out.splitlines() == expected_statistics(grey)


@pytest.mark.parametrize("keep", [False, True])
def test_values_of_other_types(
    tmp_path: Path, keep: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root, folder = tmp_path / "arrays", tmp_path / "packed"
    root.mkdir()
    # fewer rows than channels: nothing but --channels tells which is which
    values = np.linspace(-1, 1, 5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    np.save(root / "a.npy", values)
    flags = ("--value-range", -1, 1, "--channels", 7, *(["--keep-originals"] if keep else []))
    assert run(root, folder, *flags) == 0
    assert run("--verify", folder) == 0
    data = open_source(str(folder)).read(0)
    expected = np.rint((values + 1) * 127.5).astype(np.uint8)
    assert np.array_equal(decode(data, 7, value_range=(-1, 1)), expected)
    assert (data == (root / "a.npy").read_bytes()) == keep
    before = contents(folder)
    assert run(root, folder, *flags) == 0
    assert contents(folder) == before
    capsys.readouterr()
    assert run(root, folder, *flags, "--stats") == 0
    assert capsys.readouterr().out.splitlines()[1:] == expected_statistics([expected])
    assert run(root, tmp_path / "other") == 2
    assert "not one image could be packed (1 unreadable)" in capsys.readouterr().err


def test_large_images_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "JPEG")
    monkeypatch.setattr(encoding, "decode", None)
    with pytest.raises(UnreadableImage, match="300×200"):
        encode(file.getvalue(), Options(max_pixels=50_000))


def test_a_file_that_changes_while_it_is_packed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "growing"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(min((small / "cat").iterdir()).read_bytes())
    real = os.read

    def grow(descriptor: int, size: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("1.jpg"):
            with (root / "1.jpg").open("ab") as file:
                file.write(b"more")
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", grow)
    assert run(root, tmp_path / "packed", "--workers", 1) == 0
    assert skipped(tmp_path / "packed") == {"1.jpg": "changed: it changed while it was read"}


def test_a_shard_without_images_has_an_index_only(small: Path, tmp_path: Path) -> None:
    """DALI refuses an empty shard."""
    root = tmp_path / "mixed"
    root.mkdir()
    for number in range(6):
        data = min((small / "cat").iterdir()).read_bytes()
        (root / f"{number}.jpg").write_bytes(b"no image" if number in (2, 3) else data)
    folder = tmp_path / "packed"
    assert run(root, folder, "--images-per-shard", 2) == 0
    assert sorted(p.name for p in folder.glob("00*")) == [
        "000000.idx", "000000.json", "000000.tar", "000001.json",
        "000002.idx", "000002.json", "000002.tar",
    ]  # fmt: skip
    source = open_source(str(folder))
    assert isinstance(source, ShardSource)
    assert [path.name for path in source.shards] == ["000000.tar", "000002.tar"]
    assert list(source.names) == [
        "000000.tar/00000000.jpg", "000000.tar/00000001.jpg",
        "000002.tar/00000004.jpg", "000002.tar/00000005.jpg",
    ]  # fmt: skip
    assert source.read(3) == data
    assert run("--verify", folder) == 0
    before = contents(folder)
    assert run(root, folder, "--images-per-shard", 2) == 0
    assert contents(folder) == before


def test_hostile_tar_members_are_counted(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = min((small / "cat").iterdir()).read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE), ("../b.jpg", tarfile.REGTYPE), ("c.jpg", tarfile.SYMTYPE),
            ("d.jpg", tarfile.BLKTYPE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data))
        huge = tarfile.TarInfo("huge.jpg")
        huge.size = 2**50
        archive.fileobj.write(huge.tobuf())  # type: ignore[union-attr]
    assert run(tmp_path / "x.tar", tmp_path / "packed") == 0
    assert skipped(tmp_path / "packed") == {
        "x.tar/../b.jpg": "name that leads out of the folder",
        "x.tar/c.jpg": "link: to /etc/passwd",
        "x.tar/d.jpg": "not a regular file",
        "x.tar/huge.jpg": f"not read: {2**50} bytes, more than the limit of {2**30}",
    }
    assert "1 images" in capsys.readouterr().out


def test_nothing_to_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    assert run(tmp_path / "bad", tmp_path / "packed") == 2
    error = capsys.readouterr().err
    assert "not one image could be packed (1 unreadable)" in error
    assert error.count("\n") == 1


def test_what_is_in_the_way_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        before = contents(tmp_path / "packed")
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert contents(tmp_path / "packed") == before
        return error

    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "not empty, and no pack" in refused(small, folder)
    assert run(small, folder / "thesis.txt") == 2
    assert "thesis.txt: cannot be made: File exists" in capsys.readouterr().err
    (folder / "thesis.txt").unlink()
    assert run(small, folder) == 0
    assert "packed with short_side 256, not 64" in refused(small, folder, "--short-side", 64)
    assert "packed with shuffle None, not 1" in refused(small, folder, "--shuffle", 1)
    assert "packed from other images" in refused(small / "cat", folder)
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"{name},0\n" for name in FolderSource(small).names))
    assert "with other labels" in refused(small, folder, "--labels", table)
    assert run(tmp_path / "nowhere", folder) == 2
    nowhere = f"simmim: error: {tmp_path}/nowhere: no such file or folder\n"
    assert capsys.readouterr().err == nowhere
    with claimed(folder):
        assert "another simmim pack is at work" in refused(small, folder)
    before = contents(folder)
    assert run(small, folder) == 0
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "DEST is missing"),
        ([], "SOURCE is missing"),
        (["a", "b", "--quality", "101"], "101 is no integer from 1 to 100"),
        (["a", "b", "--short-side", "0"], "0 is no integer from 1"),
        (["a", "b", "--short-side", "9", "--keep-originals"], "leave out --short-side"),
        (["a", "--verify", "b"], "leave out SOURCE"),
        (["a", "b", "--value-range", "2", "1"], "LOW must be less"),
        (["a", "b", "--overwrite"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def in_child(work: Callable[[], object], log: Path | None = None) -> Any:
    """A forked process, of a group of its own, that does `work` and exits with what it returns."""

    def begin() -> None:
        os.setpgid(0, 0)
        # a shell's background job inherits Ctrl-C as ignored, and Python then leaves it so
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if log is not None:
            sys.stdout = sys.stderr = log.open("w", buffering=1)
        code = work()
        os._exit(code if isinstance(code, int) else 0)

    process = FORK.Process(target=begin)
    process.start()
    return process


def kill_at(moment: int, main_too: bool) -> None:
    """SIGKILL this process or its worker before the n-th flush or rename of either."""
    main_process, steps = os.getpid(), mmap(-1, 8)

    def step() -> None:
        count = int.from_bytes(steps[:8], "little")
        steps[:8] = (count + 1).to_bytes(8, "little")
        if count == moment:
            if main_too:
                os.kill(main_process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            step()
            return real(*arguments)

        return call

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)  # type: ignore[assignment]


def test_killed_before_every_flush_and_rename(small: Path, tmp_path: Path) -> None:
    source, options = FolderSource(small / "cat"), Options(short_side=64, images_per_shard=4)
    labels = Labels(np.arange(7) % 2, ("even", "odd"))
    pack(source, tmp_path / "whole", options, labels)
    expected = contents(tmp_path / "whole")

    def work(folder: Path, moment: int) -> int:
        kill_at(moment, main_too=moment % 2 == 1)
        try:
            pack(source, folder, options, labels, workers=1)
        except RunError as error:
            return 3 if "died (signal SIGKILL)" in str(error) else 4
        return 0

    codes = []
    while 0 not in codes:
        folder = tmp_path / str(len(codes))
        process = in_child(lambda folder=folder: work(folder, len(codes)))  # type: ignore[misc]
        process.join()
        codes.append(process.exitcode)
        partial = contents(folder)
        pack(source, folder, options, labels)
        assert contents(folder) == expected
        for name in partial:  # what was finished stays as it was
            if name.endswith(".json") and name != "dataset.json":
                assert partial[name] == expected[name]
    # in both processes; two shards of three files, and the folder's own three
    assert set(codes) == {0, 3, -signal.SIGKILL}
    assert len(codes) == 30


def test_killed_again_and_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the main process of two workers, five times, into the same folder."""
    source, options = FolderSource(small), Options(short_side=64, images_per_shard=2)
    pack(source, tmp_path / "whole", options)
    folder, draw = tmp_path / "killed", random.Random(7)
    with monkeypatch.context() as patch:
        for _ in range(5):
            # Two of 14 images at most come before this one, and it waits for the kill: after all
            # five, two shards are still to be made.
            last = draw.randint(1, 3)
            calls = count_calls(patch, lambda count, last=last: count >= last and until_orphaned())
            process = in_child(lambda: pack(source, folder, options, workers=2))
            wait_until(lambda calls=calls, last=last: calls() >= last)
            time.sleep(draw.uniform(0, 0.01))  # the other worker, and this one's files, go on
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
    process = in_child(lambda: pack(source, folder, options, workers=2))
    process.join()
    assert process.exitcode == 0
    wait_until(lambda: not list(folder.glob(".*")))  # an orphan's last file
    assert contents(folder) == contents(tmp_path / "whole")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def count_calls(patch: pytest.MonkeyPatch, before: Callable[[int], object]) -> Callable[[], int]:
    """Count the calls of `encode` in all processes; `before` is given its number, from 1."""
    calls, lock = mmap(-1, 8), FORK.Lock()

    def counted(data: bytes, options: Options) -> Encoded:
        with lock:
            number = int.from_bytes(calls[:8], "little") + 1
            calls[:8] = number.to_bytes(8, "little")
        before(number)
        return encode(data, options)

    patch.setattr(plan, "encode", counted)
    return lambda: int.from_bytes(calls[:8], "little")


def until_orphaned() -> None:
    """Wait, in a worker, for the end of the process that began it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        time.sleep(0.002)


def test_no_process_outlives_a_killed_pack(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = tmp_path / "workers"
    workers.mkdir()

    def note(number: int) -> None:
        (workers / str(os.getpid())).touch()
        until_orphaned()

    count_calls(monkeypatch, note)
    process = in_child(
        lambda: pack(
            FolderSource(small), tmp_path / "packed", Options(images_per_shard=4), workers=2
        )
    )
    wait_until(lambda: len(list(workers.iterdir())) == 2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not any(Path("/proc", p.name).exists() for p in workers.iterdir()))


def test_a_dead_worker_is_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    last = (small / FolderSource(small).names[13]).read_bytes()

    def deadly(data: bytes, options: Options) -> Encoded:
        if data == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(data, options)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", deadly)
        assert run(small, folder, "--images-per-shard", 7, "--workers", 1) == 1
    error = capsys.readouterr().err
    assert f"the process at {folder}/000001.tar died (signal SIGKILL): out of memory" in error
    assert error.count("\n") == 1
    assert sorted(contents(folder)) == ["000000.idx", "000000.json", "000000.tar", "dataset.json"]
    assert run(small, folder, "--images-per-shard", 7) == 0


def test_an_unfinished_pack_is_not_trained_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Plan, "finish", lambda *_: None)
    pack(FolderSource(small), tmp_path / "packed", Options())
    for use in (lambda: open_source(str(tmp_path / "packed")), lambda: verify(tmp_path / "packed")):
        with pytest.raises(DataError, match="a pack that is not finished"):
            use()


def test_ctrl_c_is_one_line_and_resumable(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = tmp_path / "packed", (small, tmp_path / "packed", "--images-per-shard", 3)
    # a worker takes the first shard, and the next; the other stays at the second
    first = [FolderSource(small).read(number) for number in range(3)]

    def hold(data: bytes, options: Options) -> Encoded:
        if data not in first:
            (tmp_path / str(os.getpid())).touch()
            until_orphaned()
        return encode(data, options)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", hold)
        process = in_child(lambda: run(*arguments, "--workers", 2), tmp_path / "log")
        wait_until(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2)
        os.killpg(process.pid, signal.SIGINT)
        process.join()
    assert process.exitcode == 130
    text = (tmp_path / "log").read_text()
    assert text == "simmim: interrupted; what is finished stays, the same command goes on\n"
    left = contents(folder)
    assert not any(name.startswith(".") for name in left)
    assert [name for name in left if name.endswith(".json")] == ["000000.json", "dataset.json"]
    assert run(*arguments) == 0
    assert run(small, tmp_path / "whole", "--images-per-shard", 3) == 0
    assert contents(folder) == contents(tmp_path / "whole")


def test_files_that_cannot_grow(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = tmp_path / "packed", (small, tmp_path / "packed", "--images-per-shard", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        code = run(*arguments, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    error = capsys.readouterr().err
    assert "File too large; what is finished stays" in error
    assert error.count("\n") == 1
    assert not any(name.startswith(".") for name in contents(folder))
    assert run(*arguments) == 0


def test_a_full_disk(small: Path, tmp_path: Path) -> None:
    """A tiny file system in a mount namespace of its own; then the same, enlarged."""
    folder = tmp_path / "packed"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(["unshare", "-rm", *mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    script = f"""
import os, subprocess, sys
from simmim.cli import main
subprocess.run({mount}, check=True)
arguments = ["pack", {str(small)!r}, {str(folder)!r}, "--images-per-shard", "3", "--workers", "2"]
print(main(arguments), *sorted(os.listdir({str(folder)!r})))
subprocess.run(["mount", "-o", "remount,size=20m", {str(folder)!r}], check=True)
print(main(arguments))
print(main(["pack", "--verify", {str(folder)!r}]))
"""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script], capture_output=True, text=True
    )
    first, _, second, _, verified = done.stdout.splitlines()
    assert first.startswith("1 0000")
    assert "tmp" not in first
    assert second == verified == "0"
    assert "No space left on device; what is finished stays" in done.stderr
    assert done.stderr.count("\n") == 1


def test_verify_names_every_damage(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packed"
    assert run(small, folder, "--images-per-shard", 4) == 0
    index = index_of(folder, 0)
    with (folder / "000000.tar").open("r+b") as file:
        file.seek(index["offset"][1] + 30)
        file.write(b"\0\1\2")
        file.seek(index["offset"][2] + index["size"][2] + -index["size"][2] % 512 + 512)
        file.write(b"9")
    (folder / "000001.tar").unlink()
    (folder / "000002.idx").write_text("v1.2 4\n")
    wrong = index_of(folder, 3)
    wrong["width"][0] += 1
    (folder / "000003.json").write_text(json.dumps(wrong))
    capsys.readouterr()
    assert run("--verify", folder) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("000000.tar: 00000001.jpg: damaged")
    assert lines[1] == "000000.tar: 00000002.jpg: its label is not 0"
    assert lines[2].startswith("000001.tar: No such file")
    assert lines[3] == "000002.tar: its .idx is damaged"
    assert lines[4].startswith("000003.tar: 00000012.jpg: is [")
    assert len(lines) == 5
    assert "5 problems" in error


def test_verify_decodes_and_limits_its_lines(
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Encoded(b"no image", "jpg", 5, 5, 3)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "encode", lambda data, options: broken)
        assert run(small, tmp_path / "packed") == 0
    monkeypatch.setattr(pack_command, "MAX_PROBLEMS", 5)
    capsys.readouterr()
    assert run("--verify", tmp_path / "packed") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("000000.tar: 00000000.jpg: unreadable: ")
    assert lines[5:] == ["… and 9 more"]
    assert run("--verify", small) == 2
    assert "dataset.json: No such file" in capsys.readouterr().err


def expected_statistics(images: list[np.ndarray]) -> list[str]:
    values = np.concatenate([image.reshape(-1, image.shape[2]) for image in images]) / 255.0
    return [
        f"--data.{name}=[{','.join(f'{x:.6f}' for x in numbers)}]"
        for name, numbers in (("mean", values.mean(0)), ("std", values.std(0)))
    ]


def test_stats(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = FolderSource(small)
    assert run(small, "--stats") == 0
    found = capsys.readouterr().out.splitlines()
    assert found == expected_statistics([decode(before.read(i), 3) for i in range(14)])
    folder = tmp_path / "packed"
    assert run(small, folder, "--short-side", 30, "--stats") == 0
    found = capsys.readouterr().out.splitlines()[1:]
    source = open_source(str(folder))
    assert found == expected_statistics([decode(source.read(i), 3) for i in range(14)])
    kept = contents(folder)
    dataset = json.loads(kept["dataset.json"])
    assert len(dataset["mean"]) == len(dataset["std"]) == 3
    assert run(small, folder, "--short-side", 30) == 0  # forgets nothing
    assert contents(folder) == kept


def test_stats_of_many_channels_and_of_grey_among_rgb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(1)
    for name in ("five", "rgb"):
        (tmp_path / name).mkdir()
    arrays = [draw.integers(0, 99, (8, 9, 5), dtype=np.uint8) for _ in range(3)]
    for number, array in enumerate(arrays):
        np.save(tmp_path / "five" / f"{number}.npy", array)
    assert run(tmp_path / "five", "--stats") == 0
    assert capsys.readouterr().out.splitlines() == expected_statistics(arrays)
    colour = draw.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    grey = draw.integers(0, 256, (4, 9, 1), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "rgb" / "colour.png")
    Image.fromarray(grey[:, :, 0]).save(tmp_path / "rgb" / "grey.png")
    assert run(tmp_path / "rgb", "--stats") == 0
    expected = expected_statistics([colour, grey.repeat(3, axis=2)])
    assert capsys.readouterr().out.splitlines() == expected
    Image.fromarray(colour).convert("RGBA").save(tmp_path / "rgb" / "alpha.png")
    assert run(tmp_path / "rgb", tmp_path / "packed", "--stats") == 2
    error = capsys.readouterr().err
    assert "no mean and std: 1 images of 1, 1 images of 3, 1 images of 4 channels" in error
    assert json.loads((tmp_path / "packed" / "dataset.json").read_text())["channels"] is None


@pytest.fixture
def tables(small: Path, tmp_path: Path) -> Path:
    """Two parquet files as Hugging Face writes them: 14 rows in groups of 5, one without bytes."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    before = FolderSource(small)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
    root = tmp_path / "tables"
    root.mkdir()
    for number, rows in enumerate((range(8), range(8, 14))):
        images = [{"bytes": before.read(i), "path": before.names[i]} for i in rows]
        if number == 1:
            images.append({"bytes": None, "path": "elsewhere.jpg"})
        labels = [int(i >= 7) for i in rows] + [None] * number
        table = pa.table([pa.array(images, kind), pa.array(labels, pa.int64())], schema=schema)
        pq.write_table(table, root / f"train-{number:05d}-of-00002.parquet", row_group_size=5)
    return root


def test_parquet(
    small: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--keep-originals", "--images-per-shard", 4)
    before = FolderSource(small)
    sources = {"a": str(tables), "b": f"{tables}/train-*.parquet"}
    for name, path in sources.items():
        assert run(path, tmp_path / name, *options, "--workers", 2) == 0
        source = open_source(str(tmp_path / name))
        assert [source.read(i) for i in range(14)] == [before.read(i) for i in range(14)]
        labels = labels_of(source)
        assert labels is not None
        assert labels.classes == ("cat", "dog")
        assert labels.values.tolist() == [0] * 7 + [1] * 7
        assert skipped(tmp_path / name) == {
            "train-00001-of-00002.parquet/6": "not read: the row has no image bytes"
        }
    assert run(tables / "train-00000-of-00002.parquet", tmp_path / "one", *options) == 0
    assert len(open_source(str(tmp_path / "one")).names) == 8
    capsys.readouterr()
    assert run(tables, tmp_path / "no", "--shuffle", 1) == 2
    assert "parquet has no random access" in capsys.readouterr().err
    with pytest.raises(DataError, match=f"simmim pack {tables} FOLDER"):
        open_source(str(tables))
    (tables / "test-00000-of-00001.parquet").write_bytes(b"")
    assert run(tables, tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "holds the splits test, train; choose one" in error
    assert f"'{tables}/train-*.parquet'" in error
    assert run(tables / "test-00000-of-00001.parquet", tmp_path / "no") == 2
    assert "not a readable parquet file" in capsys.readouterr().err


def test_parquet_of_plain_bytes_and_wrong_columns(small: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = FolderSource(small).read(0)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array([data, None], pa.binary())}), path)
    source = parquet.ParquetSource([path])
    assert source.read(0) == data
    assert source.labels is None
    with pytest.raises(OSError, match="no image bytes"):
        source.read(1)
    assert source.read(0) == data  # backwards, from the beginning of the group
    for columns, message in (
        ({"picture": [data]}, "has no column 'image', only 'picture'"),
        ({"image": ["a path"]}, "column 'image' is string"),
        ({"image": [data], "label": [0.5]}, "column 'label' is double"),
        ({"image": [data], "label": [-7]}, "numbers from -7"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=message):
            parquet.ParquetSource([path])


def test_a_damaged_row_group_costs_its_rows(small: Path, tables: Path) -> None:
    path = tables / "train-00000-of-00002.parquet"
    data = bytearray(path.read_bytes())
    at = data.find(FolderSource(small).read(6)[:50])
    data[4 : 4 + 40] = bytes(40)  # the first page's header
    path.write_bytes(data)
    source = parquet.ParquetSource([path])
    with pytest.raises(OSError, match=r"."):
        source.read(2)
    assert at > 0
    assert source.read(6) == FolderSource(small).read(6)


def test_without_pyarrow(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert run(tables, tables / "packed") == 2
    assert "pip install 'simmim[parquet]'" in capsys.readouterr().err


def test_progress(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count_calls(monkeypatch, lambda number: time.sleep(0.05))
    monkeypatch.setattr(pack_command, "LINE_EVERY_S", 0.0)
    assert run(small, tmp_path / "lines", "--workers", 1) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("packed ") and "/14 images" in line for line in lines)
    assert "images/s  eta 0:0" in lines[-1]
    ours, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run(small, tmp_path / "bar", "--workers", 1) == 0
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "images/s" in shown
    assert "/14" in shown


def test_a_source_that_vanishes_ends_the_pack(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Source = FolderSource(small)

    def gone(index: int) -> bytes:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(source, "read", gone)
    monkeypatch.setattr(plan, "MAX_UNREADABLE_IN_A_ROW", 10)
    with pytest.raises(RunError, match="the last 10 images could all not be read"):
        pack(source, tmp_path / "packed", Options())


def test_labels_of_some_images_only(small: Path, tmp_path: Path) -> None:
    values = np.array([-1, 2] * 7)
    pack(FolderSource(small), tmp_path / "packed", Options(), Labels(values, ("a", "b", "c")))
    source = open_source(str(tmp_path / "packed"))
    labels = labels_of(source)
    assert labels is not None
    assert labels.values.tolist() == values.tolist()
    assert labels.classes == ("a", "b", "c")
    found = scan_tar(tmp_path / "packed" / "000000.tar")
    assert found.labels.tolist() == values.tolist()
    assert run("--verify", tmp_path / "packed") == 0
