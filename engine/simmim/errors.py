"""What ends a run with one clear line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what, where, and what to do."""


class ConfigError(ValueError):
    """A configuration that cannot run; one line that names the key and what would work."""


class DataError(RunError):
    """Data that cannot be trained on; one line that names the folder or file."""


class PathError(DataError):
    """The path that a caller gave means no usable data; the message begins with that path."""


@contextmanager
def from_setting(key: str) -> Iterator[None]:
    """Name the setting that a path came from: "photos: no image" becomes "data.path=photos: …".

    Args:
        key: of the configuration; "" where the path is no setting's.

    Raises:
        DataError: instead of a PathError.
    """
    try:
        yield
    except PathError as error:
        raise DataError(f"{key}={error}" if key else str(error)) from None
