"""Renames parameters by pairs of patterns in which * stands for a number."""

import re
from collections.abc import Iterable, Sequence


class Renaming:
    """A one-to-one renaming of parameters.

    Args:
        pairs: (our pattern, the other program's). A pattern fits a name that equals it, and one
            that goes on behind it with a dot. The first pattern that fits is taken.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._to_theirs = [_rule(ours, theirs) for ours, theirs in pairs]
        self._to_ours = [_rule(theirs, ours) for ours, theirs in pairs]

    def to_theirs(self, name: str) -> str | None:
        """The other program's name for one of ours; None if it has none."""
        return _apply(self._to_theirs, name)

    def to_ours(self, name: str) -> str | None:
        """Our name for one of the other program; None if we have none."""
        return _apply(self._to_ours, name)


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\*", r"(\d+)")
    return re.compile(rf"{pattern}(\..+)?"), target


def _apply(rules: Iterable[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            *numbers, rest = match.groups()
            for number in numbers:
                target = target.replace("*", number, 1)
            return target + (rest or "")
    return None


def unknown_names(names: Iterable[str]) -> ValueError:
    """The error to raise for names that a layout does not have."""
    listed = sorted(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ValueError(f"weights unknown: {', '.join(listed[:4])}{more}")
