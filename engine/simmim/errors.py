"""What ends a run with one clear line instead of a traceback."""


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what, where, and what to do."""
