"""Progress on standard error."""

import sys
import time

STARTED = time.perf_counter()


def print_progress(message: str) -> None:
    """Print a message with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {message}", file=sys.stderr, flush=True)
