"""Names of one layout for those of another: pairs of patterns in which * stands for a number."""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

State = dict[str, Tensor]


class Renaming:
    """A one-to-one renaming of parameters.

    Args:
        pairs: (ours, theirs); a pattern means itself, and every name that goes on with a dot. The
            first that fits counts.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._to_theirs = [_rule(ours, theirs) for ours, theirs in pairs]
        self._to_ours = [_rule(theirs, ours) for ours, theirs in pairs]

    def to_theirs(self, name: str) -> str | None:
        """Their name of a parameter of ours; None where they have none."""
        return _apply(self._to_theirs, name)

    def to_ours(self, name: str) -> str | None:
        """Our name of a parameter of theirs; None where we have none."""
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
    """The error for names that a layout does not have."""
    listed = sorted(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ValueError(f"weights unknown: {', '.join(listed[:4])}{more}")
