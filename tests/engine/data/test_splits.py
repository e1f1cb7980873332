"""Subsets and held-out images, by class."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.data.labels import Labels
from simmim.data.splits import holdout, open_labelled_sets, subset
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


def test_labels_of_validation_images_that_are_held_out_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    assert len(open_labelled_sets(str(tmp_path), seed=0, num_held_out=2)[1].labels.values) == 2
    with pytest.raises(DataError, match=r"^val_labels=list\.csv is the label file of validation"):
        open_labelled_sets(str(tmp_path), seed=0, num_held_out=2, val_labels="list.csv")
