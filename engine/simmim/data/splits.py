"""The training and validation images of a fine-tuning run, with labels that agree."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.folder import SelectedSource
from simmim.data.labels import Labels, labels_of, match_classes
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.errors import DataError, PathError, from_setting
from simmim_kernels.splitmix import fold, permutation

# Folders beside one called "train" that hold its validation images.
VALIDATION_FOLDERS = ("val", "valid", "validation")

# Where validation images are held out of the training images: this share, and no more than that.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 50_000


@dataclass(frozen=True)
class SettingNames:
    """What a user calls the arguments of `open_labelled_sets`, for its messages.

    Attributes:
        path: key of the training images' path, see `simmim.errors.from_setting`.
        val_path: key of the validation images' path.
        labels: what to give where nothing tells the classes.
        val_labels: key of the label file of the validation images.
        num_held_out: the number of images to hold out.
        validation: what to give where there are too few images to hold some out.
    """

    path: str = ""
    val_path: str = ""
    labels: str = "a label file"
    val_labels: str = "val_labels"
    num_held_out: str = "num_held_out"
    validation: str = "val_path or num_held_out"


@dataclass(frozen=True)
class LabelledImages:
    """Images of which every one has a class.

    Attributes:
        source: the images.
        labels: their classes, none of them -1.
        name: what messages call the set.
    """

    source: Source
    labels: Labels
    name: str


def open_labelled_sets(
    path: str,
    *,
    seed: int,
    val_path: str = "",
    num_held_out: int = 0,
    fraction: float = 1.0,
    labels: str = "",
    val_labels: str = "",
    classes: str = "",
    first_number: int | None = None,
    names: SettingNames | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images.

    Args:
        path: training images; a folder with `train` and `val` in it means those two.
        seed: of what is held out and of the fraction.
        val_path: validation images; "" holds some of `path` out.
        num_held_out: how many, in proportion to the classes; 0 is a tenth, 50,000 at most.
        fraction: share of the training images of every class that is kept.
        labels: label file of `path`; "" takes the source's own labels, else class folders.
        val_labels: the same of `val_path`.
        classes: file with the names of a label file's classes.
        first_number: what a label file of numbers calls the first class.
        names: what messages call these arguments; None takes the names here.

    Raises:
        DataError: no images, no labels, classes that differ, or an empty set; names the path.
    """
    names = names or SettingNames()
    root = Path(path).expanduser()
    if not val_path and (root / "train").is_dir():
        beside = [name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
        if beside:
            path, val_path = str(root / "train"), str(root / beside[0])
            if num_held_out:
                raise DataError(
                    f"{names.num_held_out}={num_held_out} holds nothing out, for {val_path} has "
                    f"the validation images: leave it out, or train on {path}"
                )
    with from_setting(names.path):
        source, own = _open(path, labels, classes, first_number, names)
        if len(own.classes) < 2:
            raise PathError(f"{path}: all images are of one class ({own.classes[0]})")
    if val_path:
        with from_setting(names.val_path):
            val_source, val_own = _open(val_path, val_labels, classes, first_number, names)
            try:
                val_own = match_classes(val_own, own.classes)
            except DataError as error:
                raise PathError(f"{val_path}: {error}") from None
            held = np.flatnonzero(val_own.values >= 0)
            if not len(held):
                raise PathError(f"{val_path}: no labelled image to validate on")
        kept = np.flatnonzero(own.values >= 0)
    else:
        if val_labels:
            raise DataError(
                f"{names.val_labels}={val_labels} is the label file of validation images, and "
                f"those are held out of {path}: leave it out, or give {names.validation}"
            )
        val_path, val_source, val_own = f"{path} (held out)", source, own
        with from_setting(names.path):
            kept, held = _hold_out(own, path, num_held_out, seed, names)
    if fraction < 1:
        chosen = np.full(len(own.values), -1, dtype=np.int64)
        chosen[kept] = own.values[kept]
        kept = subset(Labels(chosen, own.classes), fraction, seed)
    return _select(source, own, kept, path), _select(val_source, val_own, held, val_path)


def _open(
    path: str, label_file: str, class_file: str, first_number: int | None, names: SettingNames
) -> tuple[Source, Labels]:
    source = open_source(path)
    file = Path(label_file).expanduser() if label_file else None
    labels = labels_of(
        source,
        file,
        class_file=Path(class_file).expanduser() if file is not None and class_file else None,
        first_number=first_number if file is not None else None,
    )
    if labels is None:
        raise PathError(
            f"{path}: nothing tells the classes of its images: put them into a folder per class, "
            f"or give {names.labels}"
        )
    return source, labels


def _hold_out(
    labels: Labels, path: str, count: int, seed: int, names: SettingNames
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    total = int((labels.values >= 0).sum())
    count = count or min(MOST_HELD_OUT, int(total * HELD_OUT_SHARE))
    if not count:
        raise PathError(
            f"{path}: {total} labelled images are too few to hold a tenth out for validation; "
            f"give {names.validation}"
        )
    try:
        return holdout(labels, count, seed)
    except ValueError as error:
        raise PathError(f"{path}: {names.num_held_out}: {error}") from None


def _select(
    source: Source, labels: Labels, samples: NDArray[np.int64], name: str
) -> LabelledImages:
    chosen = Labels(labels.values[samples], labels.classes)
    if len(samples) == len(source.names):
        return LabelledImages(source, chosen, name)
    return LabelledImages(SelectedSource(source, samples), chosen, name)


# Keeps the splits' draws apart from other uses of the same seed.
STREAM = 0x73706C74  # "splt"


def subset(labels: Labels, fraction: float, seed: int) -> NDArray[np.int64]:
    """A share of every class, at least one image each: the 1 % and 10 % of semi-supervised runs.

    A pure function; the subset of a smaller fraction is part of that of a larger one.

    Returns:
        int64 [n], ascending sample numbers; images without a label are never among them.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: choose a share above 0 and up to 1")
    chosen = [
        _shuffled(members, seed)[: max(1, round(fraction * len(members)))]
        for members in _members(labels)
    ]
    return np.sort(np.concatenate([*chosen, np.empty(0, dtype=np.int64)]))


def holdout(labels: Labels, count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split labelled images by class: `count` held out, in proportion, the rest kept.

    A pure function; every class keeps at least one image.

    Returns:
        (kept, held out): int64, ascending sample numbers; images without a label are in neither.

    Raises:
        ValueError: fewer than `count` images can be spared.
    """
    members = _members(labels)
    sizes = np.array([len(m) for m in members], dtype=np.int64)
    spare = int((sizes - 1).sum())
    if not 0 <= count <= spare:
        raise ValueError(
            f"count={count}: of {int(sizes.sum())} labelled images in {len(sizes)} classes, "
            f"0 to {spare} can be held out"
        )
    quota = count * sizes / max(1, sizes.sum())
    held = np.floor(quota).astype(np.int64)
    ties = permutation(fold(STREAM, seed), len(sizes))
    while (left := count - int(held.sum())) > 0:
        order = np.lexsort((ties, held - quota))  # the largest remainder first
        held[order[held[order] < sizes[order] - 1][:left]] += 1
    shuffled = [_shuffled(m, seed) for m in members]
    none = np.empty(0, dtype=np.int64)
    return (
        np.sort(np.concatenate([none, *(s[n:] for s, n in zip(shuffled, held))])),
        np.sort(np.concatenate([none, *(s[:n] for s, n in zip(shuffled, held))])),
    )


def _members(labels: Labels) -> list[NDArray[np.int64]]:
    # the samples of every class that has any, ascending
    order = np.argsort(labels.values, kind="stable").astype(np.int64)
    values = labels.values[order]
    starts = np.flatnonzero(np.diff(values, prepend=-2))
    groups = np.split(order, starts[1:]) if len(order) else []
    return [group for group in groups if labels.values[group[0]] >= 0]


def _shuffled(members: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    # keyed by its first image: a class's draw does not depend on the other classes
    return members[permutation(fold(STREAM, seed, int(members[0])), len(members))]
