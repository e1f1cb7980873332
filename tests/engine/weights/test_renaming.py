"""Renaming by patterns: both ways, numbers in their places, the first pattern first."""

import pytest

from simmim.weights.renaming import Renaming, unknown_names

RENAMING = Renaming(
    [("a.*.b.*.norm", "x.*.y.*.ln"), ("a.*.b.*", "x.*.z.*"), ("head", "out.fc"), ("t", "u")]
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("a.3.b.14.norm.weight", "x.3.y.14.ln.weight"),
        ("a.3.b.14.fc.weight", "x.3.z.14.fc.weight"),
        ("head.bias", "out.fc.bias"),
        ("t", "u"),
    ],
)
def test_names_go_there_and_back(ours: str, theirs: str) -> None:
    assert RENAMING.to_theirs(ours) == theirs
    assert RENAMING.to_ours(theirs) == ours


@pytest.mark.parametrize("name", ["header.bias", "a.x.b.1.norm", "xa.1.b.1.norm", "tt"])
def test_names_that_only_look_alike_have_no_place(name: str) -> None:
    assert RENAMING.to_theirs(name) is None


def test_unknown_names_are_told_sorted_and_cut_short() -> None:
    assert str(unknown_names("ba")) == "weights unknown: a, b"
    assert str(unknown_names("fedcba")) == "weights unknown: a, b, c, d and 2 more"
