"""How images are named and read: which files count, many strings in two arrays, whole files."""

import errno
import os
from pathlib import Path

import pytest

from simmim.data import source as source_module
from simmim.data.source import PackedStrings, is_array, is_image, is_machine_fault, read_file

PINNED = "7b306f5995ab21a5"  # of two names


def test_packed_strings() -> None:
    names = ["a", "", "ü/ß.jpg", "\udcff.png"]
    packed = PackedStrings(names)
    assert list(packed) == names
    assert len(packed) == 4
    assert packed.digest() != PackedStrings(["a", "ü/ß.jpg", "", "\udcff.png"]).digest()
    assert PackedStrings([]).digest()


def test_the_digest_of_names_is_for_good() -> None:
    """A run is resumed where it is the same: it changes with every name and every border."""
    assert PackedStrings(["a.jpg", "b.jpg"]).digest() == PINNED
    others = (["a.jpg", "c.jpg"], ["a.jpgb", ".jpg"], ["a.jpg"], ["b.jpg", "a.jpg"])
    assert PINNED not in {PackedStrings(names).digest() for names in others}


def test_joined_strings_are_those_of_all_parts() -> None:
    parts = [["a", ""], [], ["ü.jpg"], ["", "b", "cd"]]
    joined = PackedStrings.joined([PackedStrings(part) for part in parts])
    names = [name for part in parts for name in part]
    assert list(joined) == names
    assert joined.digest() == PackedStrings(names).digest()
    assert list(PackedStrings.joined([])) == []


@pytest.mark.parametrize(
    ("name", "image", "array"),
    [
        ("a.jpg", True, False), ("d.e/f.JPEG", True, False), ("a.b.Tif", True, False),
        ("a.avif", True, False), (".a.jpg", False, False), ("d/.a.jpg", False, False),
        (".d/a.jpg", True, False), ("a.npy", False, True), ("d/b.NPY", False, True),
        ("d/.b.npy", False, False), ("jpg", False, False), ("a.jpg.txt", False, False),
        ("a.npz", False, False), (".jpg", False, False),
    ],
)  # fmt: skip
def test_files_are_known_by_their_names(name: str, image: bool, array: bool) -> None:
    assert (is_image(name), is_array(name)) == (image, array)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_descriptors_or_memory_is_the_machines_fault(number: int) -> None:
    assert is_machine_fault(OSError(number, "x"))
    assert not is_machine_fault(OSError(errno.ENOENT, "x"))
    assert not is_machine_fault(OSError("x"))
    assert not is_machine_fault(ValueError(number))


def test_a_file_is_read_whole_in_as_many_pieces_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 3
    (tmp_path / "a.jpg").write_bytes(data)
    before = os.listdir("/proc/self/fd")
    assert read_file(str(tmp_path / "a.jpg")) == data
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 100)))
    assert read_file(str(tmp_path / "a.jpg")) == data
    assert os.listdir("/proc/self/fd") == before
    (tmp_path / "empty.jpg").touch()
    assert read_file(str(tmp_path / "empty.jpg")) == b""


@pytest.mark.parametrize("change", ["shorter", "longer", "other bytes"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(300))
    os.utime(path, ns=(10**18, 10**18))
    read = os.read

    def change_first(descriptor: int, size: int) -> bytes:
        if path.read_bytes() == bytes(300):
            path.write_bytes({"shorter": b"x", "longer": bytes(301)}.get(change, b"x" * 300))
            if change != "other bytes":  # its date says nothing
                os.utime(path, ns=(10**18, 10**18))
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", change_first)
    with pytest.raises(OSError, match="it changed while it was read"):
        read_file(str(path))


def test_what_is_no_file_of_a_possible_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # nobody writes to it: not to be waited for
    for path in (tmp_path / "pipe.jpg", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(str(path))
    monkeypatch.setattr(source_module, "MAX_FILE_BYTES", 300)
    (tmp_path / "a.jpg").write_bytes(bytes(300))
    assert len(read_file(str(tmp_path / "a.jpg"))) == 300
    (tmp_path / "a.jpg").write_bytes(bytes(301))
    with pytest.raises(OSError, match="301 bytes, more than the limit of 300"):
        read_file(str(tmp_path / "a.jpg"))
