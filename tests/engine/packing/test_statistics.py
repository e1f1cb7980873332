"""Mean and standard deviation of pixels, to the last digit."""

import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from packed_folders import contents, expected_statistics, run
from simmim.data.decode import decode
from simmim.data.folder import FolderSource
from simmim.data.open import open_source
from simmim.data.source import PackedStrings
from simmim.errors import DataError
from simmim.packing import statistics as statistics_module
from simmim.packing.options import Options
from simmim.packing.pack import pack
from simmim.packing.statistics import Statistics, pack_statistics, statistics


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


class Arrays:
    """A source of arrays that are held in memory; None cannot be read."""

    def __init__(self, *arrays: np.ndarray | None) -> None:
        self.arrays = arrays
        self.names = PackedStrings([f"{number}.npy" for number in range(len(arrays))])

    def read(self, index: int) -> bytes:
        array = self.arrays[index]
        if array is None:
            raise OSError("gone")
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()


def plain(value: int, *shape: int) -> np.ndarray:
    return np.full(shape, value, dtype=np.uint8)


def test_mean_and_std_by_hand() -> None:
    sums = Statistics()
    sums.add(np.concatenate([plain(0, 2, 3, 2), plain(255, 2, 1, 2)], axis=1))
    sums.add(plain(51, 4, 2, 2))
    assert sums.mean_and_std() == (
        pytest.approx([(2 + 8 * 0.2) / 16] * 2, rel=1e-12),
        pytest.approx([np.std([0] * 6 + [1] * 2 + [0.2] * 8)] * 2, rel=1e-12),
    )


def test_grey_images_weigh_as_colour_by_their_pixels() -> None:
    sums = Statistics()
    sums.add(plain(0, 1, 6, 1))
    sums.add(np.stack([plain(255, 1, 2), plain(51, 1, 2), plain(0, 1, 2)], axis=-1))
    mean, std = sums.mean_and_std()
    assert mean == pytest.approx([2 / 8, 0.4 / 8, 0], abs=1e-12)
    assert std == pytest.approx([np.std([0] * 6 + [1] * 2), np.std([0] * 6 + [0.2] * 2), 0])


def test_large_images_are_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    whole, parts = Statistics(), Statistics()
    whole.add(image)
    monkeypatch.setattr(statistics_module, "_BLOCK", 20)  # 99 pixels: five blocks, the last short
    parts.add(image)
    assert parts == whole
    assert whole.sums[3][0] == 99


@pytest.mark.parametrize("count", [1, 4, 5, 9])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_image_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, count: int, workers: int
) -> None:
    monkeypatch.setattr(statistics_module, "CHUNK", 4)
    arrays: list[np.ndarray | None] = [plain(number, 3, 3, 2) for number in range(1, count + 1)]
    told: list[tuple[int, int]] = []
    sums = statistics(
        Arrays(*arrays, None), workers=workers, max_pixels=9,
        tick=lambda done, skipped: told.append((done, skipped)),
    )  # fmt: skip
    assert sums.images == {2: count}
    assert sums.sums[2][:2] == (9 * count, [9 * count * (count + 1) // 2] * 2)
    assert sums.skipped == 1
    assert told[-1] == (count, 1)


def test_statistics_take_limit_range_and_channels() -> None:
    deep = np.full((3, 2, 1), 500, dtype=np.uint16)
    source = Arrays(deep, np.zeros((7, 1, 1), dtype=np.uint16))
    sums = statistics(source, max_pixels=6, value_range=(0, 1000), channels=1)
    assert (sums.images, sums.skipped) == ({1: 1}, 1)
    assert sums.mean_and_std()[0] == [128 / 255]
    turned = statistics(Arrays(plain(9, 5, 6, 7)), max_pixels=99, channels=7)
    assert turned.images == {7: 1}


def test_a_fault_of_the_machine_ends_the_count() -> None:
    source = Arrays(plain(1, 1, 1, 1))

    def fail(index: int) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    source.read = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Too many open files"):
        statistics(source, max_pixels=9)


def test_no_image_has_no_statistics() -> None:
    with pytest.raises(DataError, match="no image was read"):
        statistics(Arrays(None), max_pixels=9).mean_and_std()


@pytest.mark.parametrize(
    ("options", "shape", "value"),
    [
        (Options(value_range=(0, 1000)), (6, 5, 2), 500),
        (Options(channels=5), (6, 5, 5), 77),
        (Options(channels=7, value_range=(0, 1000)), (3, 6, 7), 500),
        (Options(), (9, 9, 7), 77),
    ],
)
def test_a_packs_statistics_read_its_images_as_they_were_packed(
    tmp_path: Path, options: Options, shape: tuple[int, ...], value: int
) -> None:
    array = np.full(shape, value, dtype=np.uint8 if value < 256 else np.uint16)
    pack(Arrays(array, array), tmp_path / "packed", replace(options, keep_originals=True))
    told: list[tuple[int, int]] = []
    found = pack_statistics(
        tmp_path / "packed", max_pixels=10**6, tick=lambda *counts: told.append(counts)
    )
    level = value if value < 256 else 128
    assert found == ([pytest.approx(level / 255)] * shape[2], [0.0] * shape[2])
    assert told[-1] == (2, 0)
    # kept: they are not computed again
    (tmp_path / "packed" / "000000.tar").unlink()
    assert pack_statistics(tmp_path / "packed", max_pixels=10**6, tick=pytest.fail) == found


def test_a_packs_statistics_heed_the_limit(tmp_path: Path) -> None:
    pack(Arrays(plain(1, 2, 2, 2)), tmp_path / "packed", Options())
    with pytest.raises(DataError, match=r"packed: no mean and std: no image was read"):
        pack_statistics(tmp_path / "packed", max_pixels=3, tick=lambda *_: None)
