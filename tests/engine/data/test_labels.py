"""Labels: layouts of label files, what is refused and how, classes that must agree, splits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from simmim.data.labels import Labels, labels_of, match_classes
from simmim.data.open import open_source
from simmim.data.source import PackedStrings
from simmim.errors import DataError

NAMES = ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/sub/4.JPEG"]


@dataclass
class Listed:
    """A source of names; labels read no image."""

    names: PackedStrings
    labels: Labels | None = None

    def read(self, index: int) -> bytes:
        raise AssertionError(f"image {index} was read")


def listed(*names: str) -> Listed:
    return Listed(PackedStrings(names or NAMES))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def refusal(*arguments: object, **options: object) -> str:
    """The text of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        labels_of(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbered(labels: Labels | None) -> list[int]:
    assert labels is not None
    assert labels.values.dtype == np.int64
    return labels.values.tolist()


def labels_by_name(labels: Labels | None) -> list[str]:
    assert labels is not None
    return [labels.classes[value] for value in labels.values]


def test_class_folders_are_numbered_as_image_folder_sorts_them(
    write_image: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("dog/a.jpg", "Zebra/b.jpg", "10/c.jpg", "9/d.jpg", "dog/deep/er.jpg"):
        write_image(name)
    source = open_source(str(tmp_path))
    labels = labels_of(source)
    assert labels is not None
    assert labels.classes == ("10", "9", "Zebra", "dog")
    assert labels_by_name(labels) == [name.split("/")[0] for name in source.names]
    try:
        from torchvision.datasets import ImageFolder
    except Exception:  # whatever a torchvision raises beside a torch that it was not built for
        return
    theirs = ImageFolder(str(tmp_path))
    assert tuple(theirs.classes) == labels.classes
    ours = dict(zip(source.names, labels.values.tolist()))
    assert {str(Path(p).relative_to(tmp_path)): number for p, number in theirs.samples} == ours


@pytest.mark.parametrize(
    "names",
    [["a.jpg", "b.jpg"], ["cat/a.jpg", "b.jpg"], ["train/a.jpg", "val/b.jpg"], ["0.tar/a.jpg"]],
)
def test_what_tells_no_classes_apart(names: list[str]) -> None:
    assert labels_of(listed(*names)) is None


def test_class_folders_in_shards() -> None:
    labels = labels_of(listed("0.tar/dog/1.jpg", "0.tar/cat/2.jpg", "1.tar/dog/3.jpg"))
    assert labels is not None
    assert labels.classes == ("cat", "dog")
    assert numbered(labels) == [1, 0, 1]


def test_shards_of_one_class_each() -> None:
    names = ["n02.tar/n02_7.JPEG", "n01.tar/n01_3.JPEG", "n02.tar/n02_9.JPEG"]
    labels = labels_of(listed(*names))
    assert labels is not None
    assert labels.classes == ("n01", "n02")
    assert numbered(labels) == [1, 0, 1]
    assert labels_of(listed(*names, "n02.tar/other.JPEG")) is None


def test_a_source_that_knows_its_labels(write: Callable[[str, str], Path]) -> None:
    own = Labels(np.array([1, 0, 0, 1]), ("x", "y"))
    source = Listed(PackedStrings(NAMES), own)
    assert labels_of(source) is own
    wins = write("l.csv", "".join(f"{name},z\n" for name in NAMES))
    assert labels_by_name(labels_of(source, wins)) == ["z"] * 4


ROWS = list(zip(NAMES, [2, 0, 1, 1]))
LAYOUTS = {
    "plain.csv": "".join(f"{n},{v}\n" for n, v in ROWS),
    "header.csv": "id,Label,file_name,split\n"
    + "".join(f'{i},{v},"{n}",train\n' for i, (n, v) in enumerate(ROWS)),
    "semicolon.csv": "filename;class\n" + "".join(f"{n};{v}\n" for n, v in ROWS),
    "crlf.csv": "".join(f"{n},{v}\r\n" for n, v in ROWS),
    "bom.csv": "\ufeffname,label\n" + "".join(f"{n},{v}\n" for n, v in ROWS),
    "blank.tsv": "\n" + "\n\n".join(f"{n}\t{v}" for n, v in ROWS),
    "header.tsv": "label\tpath\n" + "".join(f"{v}\t./{n}\n" for n, v in ROWS),
    "object.json": json.dumps(dict(ROWS)),
    "records.json": json.dumps([{"file_name": n, "label": v, "more": [1]} for n, v in ROWS]),
    "pairs.json": json.dumps([[n, v] for n, v in ROWS]),
    "digits.json": json.dumps({n: str(v) for n, v in ROWS}),
    "records.jsonl": "\n".join(json.dumps({"image": n, "class": v}) for n, v in ROWS),
    "pairs.ndjson": "\n".join(json.dumps([n, v]) for n, v in ROWS) + "\n\n",
    "val.txt": "".join(f"{n} {v}\n" for n, v in reversed(ROWS)),
    "map_without_extension": "".join(f"{n}\t{v}\n" for n, v in ROWS),
    "basenames.txt": "".join(f"{Path(n).name} {v}\n" for n, v in ROWS),
    "stems.csv": "id,label\n" + "".join(f"{Path(n).stem},{v}\n" for n, v in ROWS),
    "longer_paths.txt": "".join(f"data/train/{n} {v}\n" for n, v in ROWS),
    "repeated.txt": "".join(f"{n} {v}\n" for n, v in ROWS * 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_numbers(write: Callable[[str, str], Path], name: str) -> None:
    labels = labels_of(listed(), write(name, LAYOUTS[name]))
    assert labels is not None
    assert numbered(labels) == [2, 0, 1, 1]
    assert labels.classes == ("0", "1", "2")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_in_shards(write: Callable[[str, str], Path], name: str) -> None:
    names = [f"{i % 2}.tar/{name}" for i, name in enumerate(NAMES)]
    assert numbered(labels_of(listed(*names), write(name, LAYOUTS[name]))) == [2, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'name,label\n"a, b.jpg","say ""hi"""\nc d.jpg,"tern, arctic"\n'),
        ("a.tsv", 'a, b.jpg\t"say ""hi"""\nc d.jpg\ttern, arctic\n'),
        ("a.json", '{"a, b.jpg": "say \\"hi\\"", "c d.jpg": "tern, arctic"}'),
        ("a.txt", 'a, b.jpg\tsay "hi"\nc d.jpg\ttern, arctic\n'),
    ],
)
def test_class_names_with_separators(
    write: Callable[[str, str], Path], name: str, text: str
) -> None:
    labels = labels_of(listed("a, b.jpg", "c d.jpg"), write(name, text))
    assert labels_by_name(labels) == ['say "hi"', "tern, arctic"]


def test_names_with_spaces_in_a_list(write: Callable[[str, str], Path]) -> None:
    path = write("val.txt", "my cat.jpg 1\nmy dog.jpg 0\n")
    assert numbered(labels_of(listed("my cat.jpg", "my dog.jpg"), path)) == [1, 0]


def test_names_with_semicolons(write: Callable[[str, str], Path]) -> None:
    path = write("l.csv", "my;cat.jpg,1\nmy;dog.jpg,0\n")
    assert numbered(labels_of(listed("my;cat.jpg", "my;dog.jpg"), path)) == [1, 0]


def test_paths_from_here(write: Callable[[str, str], Path]) -> None:
    path = write("l.txt", "./b/1.jpg 1\n./a/1.jpg 0\n")
    assert numbered(labels_of(listed("a/1.jpg", "b/1.jpg"), path)) == [0, 1]


def test_exact_paths_win_over_file_names(write: Callable[[str, str], Path]) -> None:
    source = listed("1.jpg", "a/1.jpg", "b/2.jpg")
    path = write("l.txt", "2.jpg 0\n1.jpg 1\na/1.jpg 2\n")
    assert numbered(labels_of(source, path)) == [1, 2, 0]
    elsewhere = write("m.txt", "a/1.jpg 0\nb/1.jpg 1\n")
    assert '"b/1.jpg" is no image' in refusal(listed("a/1.jpg"), elsewhere)
    assert numbered(labels_of(listed("a/1.jpg"), elsewhere, partial=True)) == [0]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("e.csv", "", ["no label in it"]),
        ("e.json", "[]", ["no label in it"]),
        ("e.jsonl", "\n", ["no label in it"]),
        ("e.txt", " \n", ["no label in it"]),
        ("head.csv", "name,label\n", ["no label in it"]),
        ("a.csv", "cat/1.jpg,0\nghost.jpg,1\n", ["line 2", '"ghost.jpg"', "1 of 2", "correct"]),
        ("a.csv", "cat/1.jpg,0\ncat/1.jpg,1\n", ["line 2", "label 1 here and 0 at line 1", "keep"]),
        ("a.json", '{"cat/1.jpg": 0, "cat/1.jpg": 1}', ["entry 2", "1 here and 0 at entry 1"]),
        ("a.csv", "cat/1.jpg,0\ncat/2.jpg,-1\n", ["line 2", "-1 is out of range, 0 to"]),
        ("a.csv", "cat/1.jpg,0\ncat/2.jpg,99999999999999999999\n", ["line 2", "out of range"]),
        ("a.csv", f"cat/1.jpg,0\ncat/2.jpg,{'9' * 5000}\n", ["line 2", "is no integer"]),
        ("a.csv", '"a\nb",0\n', ["line 2", '"a b" is no image']),
        ("a.csv", f"{'long ' * 1000},0\n", ["line 1", "…", "correct the names"]),
        ("a.csv", "cat/1.jpg,0\ncat/2.jpg,1.5\n", ["line 2", '"1.5" is no integer', "from 0"]),
        ("a.csv", "cat/1.jpg,1.0\ncat/2.jpg,0.0\n", ["line 1", '"1.0" is no integer']),
        ("a.json", '{"cat/1.jpg": 1.0}', ["entry 1", '"1.0" is no integer']),
        ("a.csv", "cat/1.jpg,0\ncat/2.jpg,1O\n", ["line 2", '"1O" is no integer']),
        ("a.csv", "cat/1.jpg,cat\ncat/2.jpg,1\n", ["line 2", '"1" is a number', "write one kind"]),
        ("a.csv", "cat/1.jpg,\n", ["line 1", "no label", "complete"]),
        ("a.csv", ",0\n", ["line 1", "no name"]),
        ("a.csv", "cat/1.jpg\n", ["line 1", "1 columns instead of 2"]),
        ("a.csv", "name,label\ncat/1.jpg,0,9\n", ["line 2", "3 columns instead of 2"]),
        ("a.csv", "a,b,c\n", ["line 1", "3 columns instead of 2", "header"]),
        ("a.csv", "name,colour\nx.jpg,red\n", ["line 1", "name, colour", "label", "call it"]),
        ("a.csv", "photo,label\nx.jpg,red\n", ["line 1", "photo, label", "none is a name"]),
        ("a.csv", 'name,label\n"cat/1.jpg,0\n', ["line 2", "quotes"]),
        ("a.json", "{'a': 1}", ["line 1", "not JSON"]),
        ("a.json", '{\n"cat/1.jpg": 0,\n}', ["line", "not JSON"]),
        ("a.json", "3", ["holds 3", "list of entries"]),
        ("a.json", '[["cat/1.jpg", 0, 1]]', ["entry 1", "a list of 3"]),
        ("a.json", '[["cat/1.jpg", true]]', ["entry 1", "the label is true"]),
        ("a.json", '{"cat/1.jpg": {"x": 1}}', ["entry 1", "the label is an object"]),
        ("a.json", "[[7, 0]]", ["entry 1", "the name is 7"]),
        ("a.json", '[{"picture": "x", "label": 0}]', ["entry 1", "picture, label", "a name"]),
        ("a.jsonl", '{"name": "cat/1.jpg", "label": 0}\n{"name"\n', ["line 2", "not JSON"]),
        ("a.jsonl", '{"name": "cat/1.jpg"}\n', ["line 1", "none is a label"]),
        ("a.txt", "cat/1.jpg\n", ["line 1", "neither a number nor a name and its label"]),
        ("a.txt", "3\n0\n", ["2 labels without names for 4 images"]),
        ("a.txt", "cat/1.jpg 1\n", ["lowest label is 1", "first_number=1", "first_number=0"]),
        ("a.txt", "cat/1.jpg 0\n", ["no label for cat/2.jpg, dog/3.jpg", "3 of 4", "partial"]),
    ],
)
def test_what_is_refused(
    write: Callable[[str, str], Path], name: str, text: str, parts: list[str]
) -> None:
    path = write(name, text)
    message = refusal(listed(), path)
    assert message.startswith(str(path))
    assert not [part for part in parts if part not in message], message


def test_unreadable_label_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(listed(), tmp_path / "none.csv")
    assert "directory" in refusal(listed(), tmp_path)
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9.jpg,0\n")
    assert "UTF-8" in refusal(listed(), tmp_path / "latin.csv")


def test_a_file_name_that_several_images_have(write: Callable[[str, str], Path]) -> None:
    path = write("l.txt", "b.jpg 1\na.jpg 0\n")
    for partial in (False, True):
        message = refusal(listed("x/a.jpg", "y/a.jpg", "b.jpg"), path, partial=partial)
        assert "line 2" in message
        assert '"a.jpg" fits several images' in message


def test_partial_lists(write: Callable[[str, str], Path]) -> None:
    path = write("l.txt", "cat/2.jpg 1\nghost.jpg 7\ndog/3.jpg 0\n")
    labels = labels_of(listed(), path, partial=True)
    assert labels is not None
    assert numbered(labels) == [-1, 1, 0, -1]
    assert len(labels.classes) == 8
    assert "2 of 2" in refusal(listed("x.jpg"), write("m.txt", "y.jpg 0\nz.jpg 0\n"), partial=True)


def test_first_number(write: Callable[[str, str], Path]) -> None:
    path = write("l.csv", "".join(f"{name},{v + 1}\n" for name, v in ROWS))
    one_based = labels_of(listed(), path, first_number=1)
    assert one_based is not None
    assert numbered(one_based) == [2, 0, 1, 1]
    assert one_based.classes == ("0", "1", "2")
    zero_based = labels_of(listed(), path, first_number=0)
    assert zero_based is not None
    assert numbered(zero_based) == [3, 1, 2, 2]
    assert len(zero_based.classes) == 4
    zero = write("z.csv", LAYOUTS["plain.csv"])
    assert "0 is out of range, 1 to" in refusal(listed(), zero, first_number=1)
    names = write("n.csv", "".join(f"{name},x\n" for name in NAMES))
    assert "leave out first_number" in refusal(listed(), names, first_number=1)
    with pytest.raises(ValueError, match="label_file"):
        labels_of(listed(), first_number=1)


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("names.txt", "owl\ncat\ndog\n", 0),
        ("clsloc.txt", "owl 1 great_owl\ndog 3 x\ncat 2 y\n", 1),
        ("numbered.txt", "0 owl\n2 dog\n1 cat\n", 0),
        ("names.json", '["owl", "cat", "dog"]', 0),
        ("numbers.json", '{"dog": 2, "owl": 0, "cat": 1}', 0),
        ("index.json", '{"1": ["cat", "a cat"], "0": ["owl", "an owl"], "2": ["dog", "a dog"]}', 0),
        ("id2label.json", '{"0": "owl", "1": "cat", "2": "dog"}', 0),
    ],
)
def test_class_files(write: Callable[[str, str], Path], name: str, text: str, first: int) -> None:
    class_file = write(name, text)
    numbers = write("l.txt", "".join(f"{n} {v + first}\n" for n, v in ROWS))
    labels = labels_of(listed(), numbers, class_file=class_file)
    assert labels is not None
    assert labels.classes == ("owl", "cat", "dog")
    assert numbered(labels) == [2, 0, 1, 1]
    by_name = write("m.csv", "".join(f"{n},{labels.classes[v]}\n" for n, v in ROWS))
    again = labels_of(listed(), by_name, class_file=class_file)
    assert again is not None
    assert again.classes == labels.classes
    assert numbered(again) == [2, 0, 1, 1]
    beyond = write("b.txt", f"cat/1.jpg {first}\ncat/2.jpg {first + 3}\n")
    assert f"{first + 3} is out of range, {first} to {first + 2}" in refusal(
        listed(), beyond, class_file=class_file
    )
    bird = write("bird.csv", "cat/1.jpg,bird\n")
    assert 'class "bird" is not in' in refusal(listed(), bird, class_file=class_file)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no class"),
        (f"a {'9' * 5000}\nb 1\n", "without gaps"),
        ("a\nb\na\n", '"a" stands there twice'),
        ("a 0 x\nb 2 y\n", "without gaps"),
    ],
)
def test_class_files_that_are_refused(
    write: Callable[[str, str], Path], text: str, part: str
) -> None:
    numbers = write("l.txt", LAYOUTS["val.txt"])
    assert part in refusal(listed(), numbers, class_file=write("c.txt", text))


def test_imagenet_ground_truth_needs_its_own_numbering(write: Callable[[str, str], Path]) -> None:
    names = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (3, 1, 2)]  # a shard keeps its own order
    path = write("ILSVRC2012_validation_ground_truth.txt", "2\n3\n1\n")
    assert "map_clsloc.txt" in refusal(listed(*names), path)
    kit = write("map_clsloc.txt", "n03 1 kit_fox\nn01 2 English_setter\nn02 3 Siberian_husky\n")
    labels = labels_of(listed(*names), path, class_file=kit)
    assert labels_by_name(labels) == ["n03", "n01", "n02"]
    assert labels is not None
    matched = match_classes(labels, ["n01", "n02", "n03"])
    assert numbered(matched) == [2, 0, 1]
    plain = write("truth.txt", "2\n3\n1\n")
    assert "first_number=1" in refusal(listed(*names), plain)
    assert numbered(labels_of(listed(*names), plain, first_number=1)) == [0, 1, 2]
    assert "repeat" in refusal(listed("a/1.jpg", "b/1.jpg"), plain, first_number=1)


def test_classes_follow_the_training_set() -> None:
    labels = Labels(np.array([0, 1, -1, 0]), ("b", "a"))
    matched = match_classes(labels, ("a", "b"))
    assert matched.classes == ("a", "b")
    assert matched.values.tolist() == [1, 0, -1, 1]


def test_classes_that_differ_are_named() -> None:
    labels = Labels(np.array([0, 1]), ("a", "cow"))
    with pytest.raises(DataError, match=r"unknown cow and missing b, c$"):
        match_classes(labels, ("a", "b", "c"))
    with pytest.raises(DataError, match=r"unknown cow$"):
        match_classes(labels, ("a", "b", "c"), subset=True)
    with pytest.raises(DataError, match=r"missing c$"):
        match_classes(Labels(np.array([0, 1]), ("a", "b")), ("a", "b", "c"))
    fewer = match_classes(Labels(np.array([1, 0]), ("c", "a")), ("a", "b", "c"), subset=True)
    assert fewer.values.tolist() == [0, 2]
    many = tuple(f"n{i:03d}" for i in range(1000))
    with pytest.raises(DataError, match=r"n000, n001, n002, n003, n004 … \(1000 in all\)"):
        match_classes(labels, many)


def test_numbers_mean_the_training_sets_order() -> None:
    numbers = Labels(np.array([1, 0]), ("0", "1"))
    assert match_classes(numbers, ("a", "b", "c")) == Labels(numbers.values, ("a", "b", "c"))
    with pytest.raises(DataError, match="2 classes"):
        match_classes(numbers, ("a",))
    folders = Labels(np.array([0, 1]), ("a", "b"))
    assert match_classes(folders, ("0", "1")).values.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"2 classes \(a, b\), the training set 3 \(0, 1, 2\)"):
        match_classes(folders, ("0", "1", "2"))
    # folders named by numbers sort as text: their names, not their places, are the numbers
    trained = tuple(sorted(str(i) for i in range(11)))
    listed_numbers = Labels(np.array([10, 2]), tuple(str(i) for i in range(11)))
    assert match_classes(listed_numbers, trained).values.tolist() == [2, 3]
    assert match_classes(Labels(np.array([0, 2]), ("0", "1", "2")), trained).values.tolist() == [
        0,
        3,
    ]


def test_class_names_are_numbered_in_sorted_order(write: Callable[[str, str], Path]) -> None:
    path = write("l.csv", "a.jpg,owl\nb.jpg,Cat\nc.jpg,dog\nd.jpg,owl\n")
    labels = labels_of(listed("a.jpg", "b.jpg", "c.jpg", "d.jpg"), path)
    assert labels is not None
    assert labels.classes == ("Cat", "dog", "owl")
    assert numbered(labels) == [2, 0, 1, 2]


def test_a_given_first_number_wins_over_that_of_the_class_file(
    write: Callable[[str, str], Path],
) -> None:
    class_file = write("kit.txt", "owl 1 x\ncat 2 x\ndog 3 x\n")
    path = write("l.txt", "a.jpg 0\nb.jpg 2\n")
    labels = labels_of(listed("a.jpg", "b.jpg"), path, class_file=class_file, first_number=0)
    assert labels_by_name(labels) == ["owl", "dog"]
    assert "0 is out of range, 1 to 3" in refusal(
        listed("a.jpg", "b.jpg"), path, class_file=class_file
    )
