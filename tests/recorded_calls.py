"""Functions replaced by ones that keep what they are called with: does every value arrive?"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def record(
    patch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    answer: Callable[..., Any] = lambda **given: None,
) -> list[dict[str, Any]]:
    """Replace a module's function; returns the arguments of its calls, by name, as they come.

    A call that the replaced function would not take is a TypeError, as it would be there.

    Args:
        patch: puts the function back.
        module: in which the function is called by its name.
        name: the function's.
        answer: makes the result of a call from its arguments by name.
    """
    signature, calls = inspect.signature(getattr(module, name)), []

    def recorder(*arguments: Any, **named: Any) -> Any:
        given = dict(signature.bind(*arguments, **named).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        calls.append(given)
        return answer(**given)

    patch.setattr(module, name, recorder)
    return calls


class Bar:
    """In place of a bar of progress: keeps which task was advanced by how much.

    Attributes:
        advanced: (task, count) as they come.
        task_ids: of the bar's only task.
    """

    def __init__(self) -> None:
        self.advanced: list[tuple[int, int]] = []
        self.task_ids = [5]

    def advance(self, task: int, count: int) -> None:
        """Keep a step."""
        self.advanced.append((task, count))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass
