"""`simmim pack`: every kind of source and reader, what is skipped, packs killed at any moment."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from packed_folders import contents, expected_statistics, index_of, run, skipped, wait_until
from simmim.data.decode import decode
from simmim.data.folder import FolderSource
from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.shards import ShardSource, scan_tar
from simmim.errors import RunError
from simmim.packing import plan
from simmim.packing.options import Options
from simmim.packing.pack import claimed, pack
from simmim.packing.tasks import Tally


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


def test_a_second_pack_makes_only_what_is_missing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = FolderSource(small), Options(images_per_shard=4)
    folder, told = tmp_path / "packed", [(0, 0, 0)]
    pack(source, folder, options)
    whole = contents(folder)
    (folder / "000001.json").unlink()
    (folder / "000003.idx").unlink()
    (folder / ".000001.tar.tmp-77").touch()
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}

    begun = plan.Plan.write_shard

    def write_shard(self: plan.Plan, folder: Path, number: int, tally: Tally) -> None:
        # told before any shard is made: a reader must not take the folder for whole
        assert json.loads((folder / "dataset.json").read_text())["images"] is None
        begun(self, folder, number, tally)

    monkeypatch.setattr(plan.Plan, "write_shard", write_shard)
    summary = pack(source, folder, options, tick=lambda *counts: told.append(counts))
    assert told[-1] == (6, 0, 8)  # 4 and 2 made, and 8 that were there
    assert contents(folder) == whole
    assert (summary.images, summary.shards) == (14, 4)
    seen = [p.name for p in folder.iterdir() if p.stat().st_mtime_ns != times.get(p.name)]
    assert {name for name in seen if name.startswith("00000")} == {
        f"{number}.{kind}" for number in ("000001", "000003") for kind in ("tar", "idx", "json")
    }


def test_workers_do_not_hold_the_lock_and_are_as_many_as_asked(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = tmp_path / "processes"
    processes.mkdir()
    begun = plan.Plan.write_shard

    def write_shard(self: plan.Plan, folder: Path, number: int, tally: Tally) -> None:
        (processes / str(os.getpid())).touch()
        wait_until(lambda: len(list(processes.iterdir())) == 3)
        held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        if str(folder) in held:
            raise RunError("a worker holds the lock")
        begun(self, folder, number, tally)

    monkeypatch.setattr(plan.Plan, "write_shard", write_shard)
    pack(FolderSource(small), tmp_path / "packed", Options(images_per_shard=5), workers=3)
    assert len(list(processes.iterdir())) == 3
