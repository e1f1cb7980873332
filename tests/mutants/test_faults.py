"""The planted faults still fit the code: each applies, and the tests that it names are there."""

from collections import Counter
from pathlib import Path

import pytest

from mutants.fault import ROOT, Fault, all_faults

FAULTS = all_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{Path(fault.file).name}-{fault.name}")
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text()
    assert fault.planted(text) != text
    assert fault.own_tests, fault
    for test in (*fault.own_tests, *fault.folder_tests):
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_each_fault_is_listed_once() -> None:
    names = Counter(fault.name for fault in FAULTS)
    patches = Counter((fault.file, fault.line, fault.fault) for fault in FAULTS)
    assert [key for counts in (names, patches) for key in counts if counts[key] > 1] == []


def test_a_fault_that_no_longer_fits_is_told() -> None:
    fault = Fault("x", "engine/simmim/files.py", "nowhere", "")
    with pytest.raises(ValueError, match="occurs 0 times"):
        fault.planted("a = 1\n")
    with pytest.raises(ValueError, match="occurs 2 times"):
        Fault("x", "f.py", "a", "b").planted("a = a\n")
    with pytest.raises(ValueError, match="not Python"):
        Fault("x", "f.py", "1", "(").planted("a = 1\n")
