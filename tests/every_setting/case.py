"""What changing a setting must change, and what it must leave alone: the lists in settings/."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fingerprint = dict[str, Any]
"""Name of an observable → its value, of a run or a call of a command."""

LISTS = Path(__file__).parent / "settings"

EXIT_CODE = "exit code"


@dataclass(frozen=True)
class Case:
    """A setting, and what differs between two runs that differ in it alone.

    Attributes:
        setting: a key, such as "train.steps", or a flag, such as "--seed".
        value: the other value, as a command line writes it.
        changes: observables of which every one must differ.
        keeps: observables of which none may differ; the exit code is always among them, unless it
            changes.
        beside: further settings of both runs, as far as the setting needs them to act.
    """

    setting: str
    value: str
    changes: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.setting}={self.value}", *self.beside])


@dataclass(frozen=True)
class Untried:
    """A setting without a case.

    Attributes:
        setting: the key or flag.
        reason: why none can be made here.
        test: the test that covers it: a file, or a file and a test.
    """

    setting: str
    reason: str
    test: str


@dataclass(frozen=True)
class Section:
    """The settings of one kind of run."""

    cases: tuple[Case, ...]
    untried: tuple[Untried, ...]

    @property
    def settings(self) -> set[str]:
        return {entry.setting for entry in (*self.cases, *self.untried)}


def read_sections(name: str) -> dict[str, Section]:
    """The sections of a list in settings/, each a line for every setting.

    The columns of a line are those of `Case`; one that has "untried" in place of a value has a
    reason and a test in place of the others.
    """
    found: dict[str, list[Case | Untried]] = {}
    for line in (LISTS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section.append(_entry(line))
    return {
        title: Section(
            tuple(entry for entry in entries if isinstance(entry, Case)),
            tuple(entry for entry in entries if isinstance(entry, Untried)),
        )
        for title, entries in found.items()
    }


def _entry(line: str) -> Case | Untried:
    setting, value, *columns = (column.strip() for column in line.split(" |"))
    if value == "untried":
        reason, test = columns
        return Untried(setting, reason, test)
    changes, keeps, beside = (*columns, "", "", "")[:3]
    changed, kept = _names(changes), _names(keeps)
    assert changed, f"{line}: a case must say what changes"
    if EXIT_CODE not in changed:
        kept = (*kept, EXIT_CODE)  # a run that fails differs in everything
    return Case(setting, value, changed, kept, tuple(beside.split()))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check(case: Case, before: Fingerprint, after: Fingerprint) -> None:
    """Raise AssertionError where a change of the setting shows otherwise than the case says."""
    unknown = {*case.changes, *case.keeps} - before.keys() - after.keys()
    assert not unknown, f"{case}: nothing of the name {', '.join(sorted(unknown))} is observed"
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    silent = [name for name in case.changes if name not in changed]
    assert not silent, (
        f"{case}: {', '.join(silent)} stayed as before, so the value did not arrive "
        f"(changed: {', '.join(sorted(changed)) or 'nothing'})"
    )
    spilt = [name for name in case.keeps if name in changed]
    assert not spilt, f"{case}: changed {', '.join(spilt)} too"


def mismatches(wanted: set[str], listed: set[str], where: str, known: set[str]) -> list[str]:
    """A line for every setting without a case, and for every case without a setting.

    Args:
        wanted: the settings that need a case.
        listed: those that the list has.
        where: file and section of the list.
        known: all settings that there are, beside `wanted`.
    """
    return [
        *(
            f"{name} has no case: say in {where} what changes with it"
            for name in sorted(wanted - listed)
        ),
        *(f"{name} is in {where}, and is no setting" for name in sorted(listed - wanted - known)),
    ]
