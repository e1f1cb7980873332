"""Many strings in two arrays."""

from simmim.data.source import PackedStrings


def test_packed_strings() -> None:
    names = ["a", "", "ü/ß.jpg", "\udcff.png"]
    packed = PackedStrings(names)
    assert list(packed) == names
    assert packed.digest() != PackedStrings(["a", "ü/ß.jpg", "", "\udcff.png"]).digest()
    assert PackedStrings([]).digest()
