"""Class labels: of a label file, of labelled shards, or of class folders.

Numbers are zero-based everywhere. A label file whose numbers do not begin at 0 is never guessed to
be one-based: whoever reads it says so with `first_number`.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.label_file import LabelTable, read_classes, read_labels
from simmim.data.source import Source
from simmim.errors import DataError

# Folders of this kind are parts of a dataset; one that has no others is no set of class folders.
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "eval"})

# A number above this is an identifier, not the number of a class.
MAX_CLASSES = 2**20

_INTEGER = re.compile(r"[+-]?\d{1,20}")
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Labels:
    """The class of every image of a source.

    Attributes:
        values: int64 [N], class numbers; -1 where an image has none.
        classes: the name of every class; "0", "1", … where only numbers are known.
    """

    values: NDArray[np.int64]
    classes: tuple[str, ...]


def labels_of(
    source: Source,
    label_file: Path | None = None,
    *,
    class_file: Path | None = None,
    first_number: int | None = None,
    partial: bool = False,
) -> Labels | None:
    """The labels of a source: a label file, else the source's own, else those of class folders.

    Class folders are the first component of every name (within a shard, the first folder in it),
    numbered in sorted order, as torchvision's ImageFolder does. Shards named after a class that
    every image in them repeats, as ImageNet's (n01440764.tar/n01440764_18.JPEG), count too.

    A label file names images by path from the data folder, else by a file name that only one image
    has, with or without extension; one with bare numbers follows the sorted file names.

    Args:
        source: images.
        label_file: see `label_file.read_labels` for its layouts.
        class_file: names of the classes by number, for label files: see `label_file.read_classes`.
        first_number: what the label file calls the first class: 0, or 1. Where not given, it is 0,
            and a file in which 0 never occurs is refused.
        partial: accept images without an entry (they get -1) and entries without an image.

    Returns:
        None where nothing tells classes apart.

    Raises:
        DataError: a label file that does not fit; names file, line and remedy.
    """
    if label_file is not None:
        table = read_labels(label_file)
        numbers, classes = _number(table, class_file, first_number)
        if table.names is None:
            order = _by_file_name(table, source.names)
            values = np.full(len(source.names), -1, dtype=np.int64)
            values[order] = numbers
        else:
            values = _place(table, numbers, source.names, partial)
        return Labels(values, classes)
    if class_file is not None or first_number is not None:
        raise ValueError("class_file and first_number explain a label_file; there is none")
    own: Labels | None = getattr(source, "labels", None)
    return own if own is not None else _of_folders(source.names)


def match_classes(
    labels: Labels,
    classes: Sequence[str],
    *,
    subset: bool = False,
    names: tuple[str, str] = ("the validation set", "the training set"),
) -> Labels:
    """The same labels numbered as `classes`: how a validation set follows the training set.

    Where only one side has names, number k means class k of the other.

    Args:
        labels: those to renumber.
        classes: the training set's, in their order.
        subset: accept labels that lack some of `classes`.
        names: what messages call the owner of `labels` and that of `classes`.

    Raises:
        DataError: classes differ; names the differences.
    """
    own, wanted = labels.classes, tuple(classes)
    if _only_one_has_names(own, wanted):
        # a list of numbers does not know how many classes there are, only the highest it holds
        complete = subset or own == _numbered(len(own)) or len(own) == len(wanted)
        if len(own) > len(wanted) or not complete:
            raise DataError(
                f"{names[0]} has {len(own)} classes ({_some(own)}), {names[1]} "
                f"{len(wanted)} ({_some(wanted)}); give both the same"
            )
        return Labels(labels.values, wanted)
    number_of = {name: number for number, name in enumerate(wanted)}
    differences = {
        "unknown": [name for name in own if name not in number_of],
        "missing": sorted(set(wanted) - set(own)) if not subset else [],
    }
    if own == _numbered(len(own)):
        differences["missing"] = []
    if any(differences.values()):
        raise DataError(
            f"{names[0]}'s classes are not {names[1]}'s {len(wanted)}: "
            + " and ".join(
                f"{kind} {_some(different)}" for kind, different in differences.items() if different
            )
        )
    renumbered = np.array([number_of[name] for name in own] + [-1], dtype=np.int64)
    return Labels(renumbered[labels.values], wanted)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _only_one_has_names(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    # the other's classes are numbers; folders that are called by numbers have names
    return any(
        x == _numbered(len(x)) and not any(name.isdecimal() for name in y)
        for x, y in ((a, b), (b, a))
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" … ({len(names)} in all)" if len(names) > 5 else "")


def _in_shard(name: str) -> tuple[str, str]:
    # ("00.tar", "dog/1.jpg") of "00.tar/dog/1.jpg", ("", name) outside shards
    shard, _, inside = name.partition("/")
    return (shard, inside) if shard.endswith(".tar") and inside else ("", name)


def _of_folders(names: Sequence[str]) -> Labels | None:
    folders: list[str] = []
    for name in names:
        shard, inside = _in_shard(name)
        folder, slash, _ = inside.partition("/")
        if not slash:
            folder = shard.removesuffix(".tar")
            if not folder or not inside.startswith(f"{folder}_"):
                return None
        folders.append(folder)
    classes = tuple(sorted(set(folders)))
    if not classes or SPLITS.issuperset(classes):
        return None
    number_of = {name: number for number, name in enumerate(classes)}
    return Labels(np.array([number_of[f] for f in folders], dtype=np.int64), classes)


def _number(
    table: LabelTable, class_file: Path | None, first_number: int | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    # the zero-based class of every entry, and the classes' names
    integers = _INTEGER.fullmatch(table.labels[0]) is not None
    for at, label in enumerate(table.labels):
        is_integer = _INTEGER.fullmatch(label) is not None
        if not is_integer and (integers or _NUMBER.fullmatch(label)):
            raise table.error(at, f'label "{label}" is no integer; number the classes from 0')
        if is_integer and not integers:
            raise table.error(
                at, f'label "{label}" is a number, those above are names; write one kind'
            )
    if first_number is not None and not integers:
        raise table.error(0, f'label "{table.labels[0]}" is a name: leave out first_number')
    names, listed_first = (None, None) if class_file is None else read_classes(class_file)
    if not integers:
        if names is None:
            names = tuple(sorted(set(table.labels)))
        number_of = {name: number for number, name in enumerate(names)}
        for at, label in enumerate(table.labels):
            if label not in number_of:
                raise table.error(at, f'class "{label}" is not in {class_file}; add it there')
        return np.array([number_of[label] for label in table.labels], dtype=np.int64), names
    if names is None and "ILSVRC" in table.path.name and "ground_truth" in table.path.name:
        raise DataError(
            f"{table.path}: its numbers follow the ILSVRC development kit, not the sorted class "
            "folders; give the kit's map_clsloc.txt as class_file"
        )
    first = listed_first if first_number is None else first_number
    return _from_numbers([int(label) for label in table.labels], table, names, first)


def _from_numbers(
    values: list[int], table: LabelTable, names: tuple[str, ...] | None, first: int | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    lowest = min(values)
    if first is None:
        if lowest > 0:
            raise DataError(
                f"{table.path}: the lowest label is {lowest}: give first_number=1 if the first "
                "class is number 1, first_number=0 if no image of class 0 is listed"
            )
        first = 0
    last = first + (MAX_CLASSES if names is None else len(names)) - 1
    if lowest < first or max(values) > last:
        at = next(i for i, value in enumerate(values) if not first <= value <= last)
        raise table.error(at, f"label {values[at]} is out of range, {first} to {last}")
    if names is None:
        names = _numbered(max(values) - first + 1)
    return np.array(values, dtype=np.int64) - first, names


def _by_file_name(table: LabelTable, names: Sequence[str]) -> NDArray[np.int64]:
    # the samples in the order of their file names, which a list of bare numbers follows
    files = [name.rsplit("/", 1)[-1] for name in names]
    if len(set(files)) < len(files):
        raise DataError(f"{table.path}: file names repeat among the images; list name and label")
    if len(files) != len(table.labels):
        raise DataError(
            f"{table.path}: {len(table.labels)} labels without names for {len(files)} images; "
            "list name and label"
        )
    return np.array(sorted(range(len(files)), key=files.__getitem__), dtype=np.int64)


def _place(
    table: LabelTable, numbers: NDArray[np.int64], names: Sequence[str], partial: bool
) -> NDArray[np.int64]:
    # the class of every image; exact names first, so that a bare file name cannot take its place
    entry_of = [-1] * len(names)
    label_of = numbers.tolist()
    unplaced = list(range(len(table.labels)))
    several: list[int] = []
    for images, entries in _ways_to_name(names, table.names or []):
        if not unplaced:
            break
        image_of: dict[str, int] = {}
        for image, key in enumerate(images):
            image_of[key] = -1 if key in image_of else image
        before, left = list(entry_of), []
        for at in unplaced:
            image = image_of.get(entries(at), len(names))
            if image < 0:
                several.append(at)
            first = entry_of[image] if 0 <= image < len(names) else len(names)
            if first < 0:
                entry_of[image] = at
            elif first < len(names) and label_of[first] == label_of[at]:
                continue  # said twice
            elif first == len(names) or before[image] >= 0:
                left.append(at)
            else:
                raise table.error(
                    at,
                    f"{names[image]} has label {table.labels[at]} here and {table.labels[first]} "
                    f"at {table.place(first)}; keep one",
                )
        unplaced = left
    missed = set(unplaced)
    for at in several:
        if at in missed:
            raise table.error(
                at, f"{table.name(at)} fits several images; write the path from the data folder"
            )
    if (missed and not partial) or len(missed) == len(table.labels):
        at = min(missed)
        raise table.error(
            at,
            f"{table.name(at)} is no image of the data ({len(missed)} of {len(table.labels)} "
            "entries are not); correct the names, or accept a partial list",
        )
    entry = np.array(entry_of, dtype=np.int64)
    without = np.flatnonzero(entry < 0)
    if len(without) and not partial:
        raise DataError(
            f"{table.path}: no label for {_some([names[int(at)] for at in without[:5]])} "
            f"({len(without)} of {len(names)} images); add them, or accept a partial list"
        )
    return np.where(entry < 0, -1, numbers[entry])


def _ways_to_name(
    images: Sequence[str], entries: Sequence[str]
) -> Iterator[tuple[list[str], Callable[[int], str]]]:
    # keys of the images, and of entry k; the most exact first
    paths = list(images)
    inside = [_in_shard(path)[1] for path in paths]
    yield paths, lambda at: entries[at]
    if inside != paths:
        yield inside, lambda at: entries[at]
    files = [path.rsplit("/", 1)[-1] for path in inside]
    yield files, lambda at: entries[at].rsplit("/", 1)[-1]
    # without an extension, as tables of identifiers name images
    yield (
        [os.path.splitext(file)[0] for file in files],
        lambda at: entries[at].rsplit("/", 1)[-1],
    )
