"""Parts of labelled images: disjoint, complete, by class, and functions of seed and labels."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simmim.data.labels import Labels
from simmim.data.splits import holdout, subset

SEEDS = st.integers(0, 2**63)


@st.composite
def labelled(draw: st.DrawFn) -> Labels:
    """Up to 60 images of up to 6 classes, some of them empty; some images have no label."""
    classes = draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(-1, classes - 1), min_size=1, max_size=60))
    return Labels(np.array(values, dtype=np.int64), tuple(map(str, range(classes))))


def _sizes(labels: Labels) -> np.ndarray:
    return np.bincount(labels.values[labels.values >= 0], minlength=len(labels.classes))


def _spare(labels: Labels) -> int:
    return int(np.maximum(_sizes(labels) - 1, 0).sum())


@given(labels=labelled(), seed=SEEDS, data=st.data())
def test_held_out_images_are_counted_and_every_other_is_kept(
    labels: Labels, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, _spare(labels)), label="held out")
    kept, held = holdout(labels, count, seed)
    assert len(held) == count
    together = np.concatenate([kept, held])
    assert sorted(together.tolist()) == np.flatnonzero(labels.values >= 0).tolist()
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())
    sizes = _sizes(labels)
    held_of = np.bincount(labels.values[held], minlength=len(sizes))
    assert (held_of < np.maximum(sizes, 1)).all()
    quota = count * sizes / max(1, sizes.sum())
    if (np.ceil(quota) < np.maximum(sizes, 1)).all():  # no class is too small for its share
        assert (abs(held_of - quota) < 1).all()


@given(labels=labelled(), seed=SEEDS, over=st.integers(1, 100))
def test_no_class_is_emptied_for_a_holdout(labels: Labels, seed: int, over: int) -> None:
    with pytest.raises(ValueError, match=f"0 to {_spare(labels)} can be held out"):
        holdout(labels, _spare(labels) + over, seed)


@given(labels=labelled(), seed=SEEDS, fractions=st.tuples(*[st.floats(1e-3, 1)] * 2).map(sorted))
def test_a_smaller_share_is_part_of_a_larger_one_and_of_every_class(
    labels: Labels, seed: int, fractions: list[float]
) -> None:
    small, large = (subset(labels, fraction, seed).tolist() for fraction in fractions)
    assert set(small) <= set(large)
    for chosen, fraction in zip((small, large), fractions):
        assert chosen == sorted(set(chosen))
        values = labels.values[np.array(chosen, dtype=np.int64)]
        of_class = np.bincount(values, minlength=len(labels.classes))
        assert of_class.tolist() == [
            max(1, round(fraction * n)) if n else 0 for n in _sizes(labels)
        ]
    everything = np.flatnonzero(labels.values >= 0).tolist()
    assert subset(labels, 1.0, seed).tolist() == everything


@given(labels=labelled(), seed=SEEDS, fraction=st.floats(0.05, 0.95), data=st.data())
def test_the_share_of_a_class_does_not_depend_on_the_others(
    labels: Labels, seed: int, fraction: float, data: st.DataObject
) -> None:
    assume((labels.values >= 0).any())
    present = sorted(set(labels.values[labels.values >= 0].tolist()))
    kept = data.draw(st.sampled_from(present), label="class")
    alone = Labels(np.where(labels.values == kept, labels.values, -1), labels.classes)
    chosen = subset(labels, fraction, seed)
    assert subset(alone, fraction, seed).tolist() == chosen[labels.values[chosen] == kept].tolist()
