"""Runs pytest in forks of one process, which has imported the large libraries already.

Reads a line of JSON for each run, {"tests": [...], "timeout_s": 60.0}, and prints its exit code.
What pytest prints goes to output.txt.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

TIMED_OUT = -1


def serve() -> None:
    """Answer requests. The libraries are imported once, and ours anew in each fork."""
    import numpy as np  # noqa: F401
    import pytest
    import torch  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            os.setsid()
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for descriptor, number in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(descriptor, number)
            options = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "not slow",
                "-rfE",
                "--no-header",
            ]
            temporary = f"--basetemp={Path.cwd() / 'temporary'}"
            code = int(pytest.main([*options, temporary, *request["tests"]]))
            sys.stdout.flush()
            os._exit(code)
        print(wait(process, request["timeout_s"]), flush=True)


def wait(process: int, timeout_s: float) -> int:
    deadline, code = time.monotonic() + timeout_s, TIMED_OUT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            killed = os.WIFSIGNALED(status)
            code = 128 + os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # also what the tests left running
    if code == TIMED_OUT:
        os.waitpid(process, 0)
    return code


if __name__ == "__main__":
    serve()
