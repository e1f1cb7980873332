"""What ends a run with one clear line instead of a traceback."""


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what, where, and what to do."""


class ConfigError(ValueError):
    """A configuration that cannot run; one line that names the key and what would work."""


class DataError(RunError):
    """Data that cannot be trained on; one line that names the folder or file."""
