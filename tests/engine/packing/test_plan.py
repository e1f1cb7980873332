"""The plan of a pack: where every image stands, what a shard is made of, and what is done."""

import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from packed_folders import index_of, skipped
from simmim.data.labels import Labels
from simmim.data.shards import ShardSource
from simmim.data.source import PackedStrings
from simmim.errors import DataError, RunError
from simmim.packing import plan as planning
from simmim.packing.options import Options
from simmim.packing.plan import Plan, is_done
from simmim.packing.tasks import Tally
from simmim_kernels.splitmix import fold, permutation

STREAM = 0x7061636B


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(file, "JPEG")
    return file.getvalue()


class Pictures:
    """A source of small JPEGs; image n is 8 + n pixels wide.

    Args:
        count: of images.
        instead: what happens in place of some images: bytes, or an error.
    """

    def __init__(self, count: int, instead: dict[int, bytes | OSError] | None = None) -> None:
        self.names = PackedStrings([f"{number}.jpg" for number in range(count)])
        self.instead = instead or {}

    def read(self, index: int) -> bytes:
        found = self.instead.get(index) or picture(index)
        if isinstance(found, OSError):
            raise found
        return found


OPTIONS = Options(images_per_shard=3)


def packed(
    folder: Path, source: Any, options: Options = OPTIONS, labels: Labels | None = None
) -> tuple[Plan, dict[str, Any], Tally]:
    """Begin, and write every shard, in this process."""
    made, tally = Plan(source, options, labels), Tally(1)
    folder.mkdir(exist_ok=True)
    dataset = made.begin(folder)
    for number in range(made.num_shards):
        made.write_shard(folder, number, tally)
    return made, dataset, tally


@pytest.mark.parametrize(
    ("images", "per_shard", "places"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 9, [2]), (0, 3, [])]
)
def test_every_image_has_a_place(images: int, per_shard: int, places: list[int]) -> None:
    made = Plan(Pictures(images), Options(images_per_shard=per_shard), None)
    assert [made.places(number) for number in range(made.num_shards)] == places


@pytest.mark.parametrize("shuffle", [None, 0, 8])
def test_shards_hold_the_images_of_their_places(tmp_path: Path, shuffle: int | None) -> None:
    labels = Labels(np.array([0, 1, -1, 2, 0, 1, 2]), ("a", "b", "c"))
    packed(tmp_path, Pictures(7), replace(OPTIONS, shuffle=shuffle), labels)
    # what a seed gives must not change between versions
    order = range(7) if shuffle is None else permutation(fold(STREAM, shuffle), 7).tolist()
    indices = [index_of(tmp_path, number) for number in range(3)]
    for column, wanted in (
        ("source", [f"{sample}.jpg" for sample in order]),
        ("width", [8 + sample for sample in order]),
        ("label", [int(labels.values[sample]) for sample in order]),
        ("name", [f"{place:08d}.jpg" for place in range(7)]),
        ("height", [8] * 7),
        ("channels", [3] * 7),
    ):
        assert [value for index in indices for value in index[column]] == wanted
    for index, shard in zip(indices, sorted(tmp_path.glob("*.tar"))):
        assert index["shard_bytes"] == shard.stat().st_size
        assert shard.stat().st_size % 10240 == 0
        assert index["source_bytes"] == sum(index["size"])  # they keep their bytes


def test_a_shard_is_flushed_before_it_is_read_back_and_renamed_before_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def noted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            steps.append(what if what != "rename" else f"rename {Path(arguments[1]).name}")
            return real(*arguments)

        monkeypatch.setattr(owner, name, call)

    made, tally = Plan(Pictures(2), OPTIONS, None), Tally(1)
    noted(os, "fsync", "flush")
    noted(os, "posix_fadvise", "forget")
    noted(planning, "check_members", "read back")
    noted(os, "replace", "rename")
    made.write_shard(tmp_path, 0, tally)
    # each file is flushed before its rename, and its folder after it
    assert steps == [
        "flush", "forget", "read back",
        "flush", "rename 000000.tar", "flush",
        "flush", "rename 000000.idx", "flush",
        "flush", "rename 000000.json", "flush",
    ]  # fmt: skip


def test_what_is_read_back_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "check_members", lambda *_: ["00000000.jpg: damaged"])
    with pytest.raises(RunError, match=r"000000.tar: not what was written \(00000000.jpg: damaged"):
        packed(tmp_path, Pictures(2))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_what_was_skipped_is_named_and_counted(tmp_path: Path) -> None:
    source = Pictures(8, {1: b"no image", 2: OSError(errno.EIO, "Input/output error"), 3: b"x",
                          4: b"x", 5: b"x"})  # fmt: skip
    source.skipped = [("a\tb", "link: to nowhere")]  # type: ignore[attr-defined]
    made, dataset, tally = packed(tmp_path, source)
    assert tally.total() == (3, 5)
    summary = made.finish(tmp_path, dataset)
    reasons = skipped(tmp_path)
    assert list(reasons) == [r"a\tb", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert reasons["2.jpg"] == "not read: Input/output error"
    assert (summary.images, summary.shards) == (3, 2)
    assert summary.skipped == {"unreadable": 4, "not read": 1, "link": 1}
    kept = sum(len(picture(number)) for number in (0, 6, 7))
    assert summary.bytes_before == summary.bytes_after == kept
    written = json.loads((tmp_path / "dataset.json").read_text())
    assert {key: written[key] for key in ("images", "shards", "skipped", "channels")} == {
        "images": 3, "shards": 3, "skipped": 6, "channels": 3,
    }  # fmt: skip


def test_bytes_before_are_those_of_the_source(tmp_path: Path) -> None:
    made, dataset, _ = packed(tmp_path, Pictures(4), replace(OPTIONS, short_side=4))
    summary = made.finish(tmp_path, dataset)
    assert summary.bytes_before == sum(len(picture(number)) for number in range(4))
    sizes = [size for shard in (0, 1) for size in index_of(tmp_path, shard)["size"]]
    assert summary.bytes_after == sum(sizes) != summary.bytes_before


def gone() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def test_many_unread_images_in_a_row_end_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MAX_UNREADABLE_IN_A_ROW", 3)
    options = Options(images_per_shard=10)
    # neither those with one between that can be read, nor those that are no images
    for name, instead in (
        ("between", {0: gone(), 1: gone(), 3: gone(), 4: gone()}),
        ("decoded", {0: gone(), 1: gone(), 2: b"x", 3: gone(), 4: gone()}),
        ("no images", {number: b"x" for number in range(5)}),
    ):
        _, _, tally = packed(tmp_path / name, Pictures(8, instead), options)
        assert tally.total() == (8 - len(instead), len(instead))
    with pytest.raises(RunError, match=r"the last 3 images could all not be read \(4.jpg: .*Input"):
        packed(tmp_path / "row", Pictures(8, {2: gone(), 3: gone(), 4: gone()}), options)


def test_a_fault_of_the_machine_is_no_skipped_image(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Too many open files"):
        packed(tmp_path, Pictures(3, {1: OSError(errno.EMFILE, "Too many open files")}))
    assert not is_done(tmp_path, 0)


def test_what_decides_over_the_bytes_decides_over_the_digest() -> None:
    labels = Labels(np.array([0, 1, 0]), ("a", "b"))
    whole = Plan(Pictures(3), OPTIONS, labels).digest()
    assert whole == Plan(Pictures(3), OPTIONS, Labels(labels.values.copy(), ("a", "b"))).digest()
    others = [
        Plan(Pictures(4), OPTIONS, labels),
        Plan(Pictures(3), OPTIONS, None),
        Plan(Pictures(3), OPTIONS, Labels(np.array([0, 1, 1]), ("a", "b"))),
        Plan(Pictures(3), OPTIONS, Labels(labels.values, ("a", "c"))),
        Plan(Pictures(3), replace(OPTIONS, quality=80), labels),
    ]
    renamed = Pictures(3)
    renamed.names = PackedStrings(["0.jpg", "1.jpg", "other.jpg"])
    others.append(Plan(renamed, OPTIONS, labels))
    assert len({whole, *(other.digest() for other in others)}) == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("short_side", 64), ("quality", 80), ("keep_originals", True), ("images_per_shard", 4),
        ("shuffle", 0), ("max_pixels", 5000), ("value_range", (0, 9)), ("channels", 3),
    ],
)  # fmt: skip
def test_a_pack_goes_on_with_the_same_options_only(
    tmp_path: Path, name: str, value: object
) -> None:
    Plan(Pictures(3), OPTIONS, None).begin(tmp_path)
    Plan(Pictures(3), OPTIONS, None).begin(tmp_path)
    with pytest.raises(DataError, match=f"packed with {name} .*, not .*choose another folder"):
        Plan(Pictures(3), replace(OPTIONS, **{name: value}), None).begin(tmp_path)  # type: ignore[arg-type]


def test_a_pack_goes_on_with_the_same_images_and_labels_only(tmp_path: Path) -> None:
    values = np.array([0, 1, 0])
    Plan(Pictures(3), OPTIONS, Labels(values, ("a", "b"))).begin(tmp_path)
    for source, labels in (
        (Pictures(3), None),
        (Pictures(3), Labels(values, ("a", "c"))),
        (Pictures(3), Labels(1 - values, ("a", "b"))),
        (Pictures(2), Labels(values[:2], ("a", "b"))),
    ):
        with pytest.raises(DataError, match="from other images or with other labels"):
            Plan(source, OPTIONS, labels).begin(tmp_path)


def test_a_folder_with_leftovers_alone_is_begun(tmp_path: Path) -> None:
    (tmp_path / ".000000.tar.tmp-123").touch()
    dataset = Plan(Pictures(3), OPTIONS, Labels(np.array([0, 1, 0]), ("a", "b"))).begin(tmp_path)
    assert json.loads((tmp_path / "dataset.json").read_text()) == dataset
    assert (dataset["images"], dataset["shards"], dataset["classes"]) == (None, 1, ["a", "b"])
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DataError, match="not empty, and no pack"):
        Plan(Pictures(3), OPTIONS, None).begin(tmp_path)


def test_a_shard_is_done_once_its_indices_are_there(tmp_path: Path) -> None:
    assert not is_done(tmp_path, 0)
    packed(tmp_path, Pictures(6, {3: b"x", 4: b"x", 5: b"x"}))
    assert is_done(tmp_path, 0)
    assert is_done(tmp_path, 1)  # without images, and so without a tar
    assert not is_done(tmp_path, 2)
    (tmp_path / "000000.idx").unlink()
    assert not is_done(tmp_path, 0)
    (tmp_path / "000001.json").write_text("{")
    assert not is_done(tmp_path, 1)
    assert len(ShardSource([tmp_path / "000000.tar"]).names) == 3


def test_a_pack_without_an_image_is_refused(tmp_path: Path) -> None:
    made, dataset, _ = packed(tmp_path, Pictures(3, {0: b"x", 1: b"x", 2: gone()}))
    with pytest.raises(DataError, match=r"not one image .*\(2 unreadable, 1 not read\)"):
        made.finish(tmp_path, dataset)
    assert json.loads((tmp_path / "dataset.json").read_text())["images"] is None
