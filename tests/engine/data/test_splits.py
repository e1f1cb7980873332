"""Subsets and held-out images, by class."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.data import splits
from simmim.data.labels import Labels
from simmim.data.source import PackedStrings
from simmim.data.splits import (
    LabelledImages,
    SettingNames,
    holdout,
    open_labelled_sets,
    subset,
)
from simmim.errors import DataError

LABELLED = Labels(np.repeat([3, 0, 1, -1, 2], [1000, 1, 40, 17, 300]), ("a", "b", "c", "d", "e"))


def test_subsets_are_stratified_seeded_and_nested() -> None:
    one, ten = subset(LABELLED, 0.01, seed=5), subset(LABELLED, 0.1, seed=5)
    assert Counter(LABELLED.values[one].tolist()) == {3: 10, 0: 1, 1: 1, 2: 3}
    assert Counter(LABELLED.values[ten].tolist()) == {3: 100, 0: 1, 1: 4, 2: 30}
    assert np.isin(one, ten).all()
    for chosen in (one, ten):
        assert chosen.dtype == np.int64
        assert (np.diff(chosen) > 0).all()
    assert np.array_equal(one, subset(LABELLED, 0.01, seed=5))
    assert not np.array_equal(one, subset(LABELLED, 0.01, seed=6))
    assert np.array_equal(subset(LABELLED, 1.0, seed=5), np.flatnonzero(LABELLED.values >= 0))
    # what a seed gives is part of a published result
    assert one.tolist() == [
        14,
        113,
        168,
        526,
        601,
        670,
        814,
        861,
        932,
        990,
        1000,
        1006,
        1129,
        1310,
        1318,
    ]
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            subset(LABELLED, wrong, seed=5)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 134, 1000, 1337])
def test_holdout_splits_in_proportion(count: int) -> None:
    kept, held = holdout(LABELLED, count, seed=2)
    assert len(held) == count
    both = np.concatenate([kept, held])
    assert np.array_equal(np.sort(both), np.flatnonzero(LABELLED.values >= 0))
    assert set(LABELLED.values[kept]) == {0, 1, 2, 3}
    of_class = Counter(LABELLED.values[held].tolist())
    for number, size in ((3, 1000), (1, 40), (2, 300)):
        assert abs(of_class[number] - count * size / 1341) < 2
    if count == 7:
        assert held.tolist() == [484, 573, 699, 956, 968, 1189, 1336]
    again = holdout(LABELLED, count, seed=2)
    assert np.array_equal(again[0], kept)
    assert np.array_equal(again[1], held)


def test_holdout_of_balanced_classes_favours_none() -> None:
    balanced = Labels(np.arange(1000) % 100, tuple(str(i) for i in range(100)))
    chosen = [balanced.values[holdout(balanced, 10, seed)[1]] for seed in range(50)]
    assert all(len(set(values)) == 10 for values in chosen)
    assert len(set(np.concatenate(chosen))) > 90


def test_holdout_that_leaves_a_class_empty_is_refused() -> None:
    for count in (1338, -1):
        with pytest.raises(ValueError, match="0 to 1337 can be held out"):
            holdout(LABELLED, count, seed=0)


def test_splits_of_nothing() -> None:
    empty = Labels(np.empty(0, dtype=np.int64), ())
    assert len(subset(empty, 0.5, 0)) == 0
    assert [len(part) for part in holdout(empty, 0, 0)] == [0, 0]


def touch(root: Path, *names: str) -> str:
    """Files with the names of images, which no split reads."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def folders(root: Path, **sizes: int) -> str:
    """A folder for each class, with so many images."""
    return touch(
        root, *(f"{name}/{i:03d}.jpg" for name, size in sizes.items() for i in range(size))
    )


def listed(images: LabelledImages) -> dict[str, str]:
    """The class of every image of a set."""
    names = [images.labels.classes[value] for value in images.labels.values]
    return dict(zip(images.source.names, names, strict=True))


def test_a_tenth_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    path = folders(tmp_path, cat=40, dog=20)
    train, held = open_labelled_sets(path, seed=3)
    assert sorted(Counter(listed(held).values()).items()) == [("cat", 4), ("dog", 2)]
    assert sorted(Counter(listed(train).values()).items()) == [("cat", 36), ("dog", 18)]
    assert not listed(train).keys() & listed(held).keys()
    assert (train.name, held.name) == (path, f"{path} (held out)")
    assert listed(open_labelled_sets(path, seed=3)[1]) == listed(held)
    assert listed(open_labelled_sets(path, seed=4)[1]) != listed(held)


def test_the_configured_number_is_held_out(tmp_path: Path) -> None:
    train, held = open_labelled_sets(folders(tmp_path, a=8, b=8), seed=0, num_held_out=5)
    assert (len(train.source.names), len(held.source.names)) == (11, 5)


def test_a_tenth_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MOST_HELD_OUT", 3)
    _, held = open_labelled_sets(folders(tmp_path, a=40, b=40), seed=0)
    assert len(held.source.names) == 3


def test_too_few_images_to_hold_some_out_are_refused(tmp_path: Path) -> None:
    path, names = folders(tmp_path, a=4, b=5), SettingNames(num_held_out="--holdout")
    with pytest.raises(DataError, match=r"9 labelled images are too few.*give val_path or num_h"):
        open_labelled_sets(path, seed=0)
    with pytest.raises(DataError, match="--holdout: count=8: of 9 labelled images in 2 classes"):
        open_labelled_sets(path, seed=0, num_held_out=8, names=names)


def test_the_fraction_is_of_the_images_that_are_not_held_out(tmp_path: Path) -> None:
    path = folders(tmp_path / "data", a=20, b=40)
    whole, held = open_labelled_sets(path, seed=1, num_held_out=30)
    train, same = open_labelled_sets(path, seed=1, num_held_out=30, fraction=0.5)
    assert listed(same) == listed(held)
    assert Counter(listed(train).values()) == {"a": 5, "b": 10}
    assert listed(train).items() <= listed(whole).items()
    other, _ = open_labelled_sets(
        path, seed=2, val_path=folders(tmp_path / "beside", a=1, b=1), fraction=0.5
    )
    again, _ = open_labelled_sets(path, seed=1, val_path=str(tmp_path / "beside"), fraction=0.5)
    assert listed(other) != listed(again)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_of_train_and_validation_images(tmp_path: Path, name: str) -> None:
    folders(tmp_path / "train", a=3, b=2)
    folders(tmp_path / name, b=1, a=2)
    train, held = open_labelled_sets(str(tmp_path), seed=0)
    assert (train.name, held.name) == (str(tmp_path / "train"), str(tmp_path / name))
    assert listed(held) == {"a/000.jpg": "a", "a/001.jpg": "a", "b/000.jpg": "b"}
    assert len(listed(train)) == 5
    with pytest.raises(DataError, match=f"num_held_out=2 holds nothing out, for .*{name} has"):
        open_labelled_sets(str(tmp_path), seed=0, num_held_out=2)


def test_a_validation_path_wins_over_the_folder_beside(tmp_path: Path) -> None:
    folders(tmp_path / "data" / "train", a=3, b=2)
    folders(tmp_path / "data" / "val", a=1, b=1)
    other = folders(tmp_path / "other", train=4, val=1, cat=1)
    train, held = open_labelled_sets(str(tmp_path / "data" / "train"), seed=0, num_held_out=2)
    assert (len(listed(train)), len(listed(held))) == (3, 2)
    train, held = open_labelled_sets(other, seed=0, val_path=other)
    assert train.name == held.name == other  # classes of it are called train and val


def test_validation_classes_are_numbered_as_the_training_sets(tmp_path: Path) -> None:
    train_list, val_list = tmp_path / "train.csv", tmp_path / "val.csv"
    train = touch(tmp_path / "t", "1.jpg", "2.jpg", "3.jpg")
    val = touch(tmp_path / "v", "4.jpg", "5.jpg", "6.jpg")
    train_list.write_text("1.jpg,owl\n2.jpg,cat\n3.jpg,owl\n")
    val_list.write_text("4.jpg,owl\n5.jpg,cat\n6.jpg,cat\n")
    classes = tmp_path / "classes.txt"
    classes.write_text("owl\ncat\n")
    first, second = open_labelled_sets(
        train, seed=0, val_path=val,
        labels=str(train_list), val_labels=str(val_list), classes=str(classes),
    )  # fmt: skip
    assert first.labels.classes == second.labels.classes == ("owl", "cat")
    assert first.labels.values.tolist() == [0, 1, 0]
    assert second.labels.values.tolist() == [0, 1, 1]
    # class folders know no file of classes: theirs is renumbered
    third = open_labelled_sets(
        train, seed=0, labels=str(train_list), classes=str(classes),
        val_path=folders(tmp_path / "w", cat=2, owl=1),
    )[1]  # fmt: skip
    assert third.labels.values.tolist() == [1, 1, 0]


def test_the_first_number_reaches_both_label_files(tmp_path: Path) -> None:
    for part in ("t", "v"):
        touch(tmp_path / part, "1.jpg", "2.jpg")
        (tmp_path / f"{part}.csv").write_text("1.jpg,1\n2.jpg,2\n")
    sets = open_labelled_sets(
        str(tmp_path / "t"), seed=0, val_path=str(tmp_path / "v"), first_number=1,
        labels=str(tmp_path / "t.csv"), val_labels=str(tmp_path / "v.csv"),
    )  # fmt: skip
    for part in sets:
        assert part.labels.values.tolist() == [0, 1]
        assert part.labels.classes == ("0", "1")


@dataclass
class Partly:
    """A source of which some images have no label, as a pack may be."""

    names: PackedStrings
    labels: Labels

    def read(self, index: int) -> bytes:
        raise AssertionError(f"image {index} was read")


def test_images_without_a_label_are_in_no_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(values: list[int]) -> Partly:
        names = PackedStrings([f"{number}.jpg" for number in range(len(values))])
        return Partly(names, Labels(np.array(values), ("a", "b")))

    sources = {"t": opened([1, -1, 0, 1, -1]), "v": opened([-1, 0, -1]), "none": opened([-1])}
    monkeypatch.setattr(splits, "open_source", sources.__getitem__)
    train, held = open_labelled_sets("t", seed=0, val_path="v")
    assert listed(train) == {"0.jpg": "b", "2.jpg": "a", "3.jpg": "b"}
    assert listed(held) == {"1.jpg": "a"}
    with pytest.raises(DataError, match="none: no labelled image to validate on"):
        open_labelled_sets("t", seed=0, val_path="none")


def test_sets_that_cannot_be_told_apart_name_the_setting(tmp_path: Path) -> None:
    names = SettingNames(path="data.path", val_path="data.val_path", labels="data.labels")
    flat = touch(tmp_path / "flat", "1.jpg", "2.jpg")
    good = folders(tmp_path / "good", a=2, b=2)
    for path, val_path, message in (
        (flat, "", f"data.path.*{flat}: nothing tells the classes.*or give data.labels"),
        (folders(tmp_path / "one", a=9), "", r"data.path.*all images are of one class \(a\)"),
        (good, flat, f"data.val_path.*{flat}: nothing tells the classes"),
        (good, folders(tmp_path / "c", a=1, c=1), "data.val_path.*unknown c and missing b"),
    ):
        with pytest.raises(DataError, match=message):
            open_labelled_sets(path, seed=0, val_path=val_path, names=names)


def test_a_class_is_drawn_by_its_own_first_image() -> None:
    alone = subset(Labels(np.array([-1] * 5 + [0] * 50), ("a",)), 0.2, 1)
    among = subset(Labels(np.array([1] * 5 + [0] * 50), ("a", "b")), 0.2, 1)
    assert set(alone) == {number for number in among if number >= 5}
    two = Labels(np.repeat([0, 1], 50), ("a", "b"))
    chosen = subset(two, 0.2, 1)
    assert set(chosen[chosen >= 50] - 50) != set(chosen[chosen < 50])  # other places of each


def test_every_class_keeps_an_image_whatever_the_ties() -> None:
    single = Labels(np.repeat(np.arange(10), [1, 1, 1, 1, 1, 6, 6, 6, 6, 6]), tuple("abcdefghij"))
    for seed in range(5):
        kept, held = holdout(single, 25, seed)
        assert len(held) == 25
        assert set(single.values[kept]) == set(range(10))


def test_labels_of_validation_images_that_are_held_out_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    assert len(open_labelled_sets(str(tmp_path), seed=0, num_held_out=2)[1].labels.values) == 2
    with pytest.raises(DataError, match=r"^val_labels=list\.csv is the label file of validation"):
        open_labelled_sets(str(tmp_path), seed=0, num_held_out=2, val_labels="list.csv")
