"""The tests that need a GPU, with nothing but pytest."""

import re
import subprocess
import sys
from pathlib import Path

from bench.gpu_stages.stage import Emit, values_are_real

ROOT = Path(__file__).parents[2]
MARK = "pytest.mark.gpu"


def run(emit: Emit, seconds: float) -> None:
    """Emit the last line of pytest, and a line for each test that did not pass.

    Raises:
        RuntimeError: a test failed, or none ran.
    """
    files = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py")
             if MARK in p.read_text(encoding="utf-8")]  # fmt: skip
    # the project's own options name plugins that a bare machine lacks
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-rfsE", "-q", "--import-mode=importlib",
        "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=", *sorted(files),
    ]  # fmt: skip
    if not values_are_real():
        command.append("--collect-only")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 60)
    )
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if re.match(r"(FAILED|ERROR|SKIPPED)", line):
            emit("not passed", line=line)
    summary = lines[-1] if lines else done.stderr[-500:]
    emit("summary", exit_code=done.returncode, line=summary)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {summary}")
