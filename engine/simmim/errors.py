"""Errors that end a run with one clear line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class RunError(RuntimeError):
    """A run cannot start or continue; the message says what failed, where, and what to do."""


class ConfigError(ValueError):
    """A configuration cannot run; the message names the key and what would work."""


class DataError(RunError):
    """Data cannot be trained on; the message names the folder or file."""


class PathError(DataError):
    """A path leads to no usable data; the message begins with that path."""


@contextmanager
def from_setting(key: str) -> Iterator[None]:
    """Name the setting that a path came from: "photos: no image" becomes "data.path=photos: …".

    Args:
        key: key of the configuration; "" if the path comes from no setting.

    Raises:
        DataError: instead of a PathError.
    """
    try:
        yield
    except PathError as error:
        raise DataError(f"{key}={error}" if key else str(error)) from None
