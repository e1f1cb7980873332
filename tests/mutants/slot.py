"""A copy of the repository in which tests run: one process that forks for each run of tests."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

from mutants.fault import ROOT, Fault


def make_copy(folder: Path) -> None:
    """Copy what git tracks and what is new, and a .venv that finds the copy before the original."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    from simmim_kernels import native

    if native.extension is not None:
        shutil.copy(str(native.extension.__file__), folder / "kernels" / "simmim_kernels")
    packages = Path(pytest.__file__).parents[1]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    [site] = (folder / ".venv" / "lib").glob("python3*/site-packages")
    paths = [folder / "engine", folder / "kernels", packages]
    (site / "copy.pth").write_text("".join(f"{path}\n" for path in paths))
    # Hashes and not times tell whether a file was compiled before: a fault may come and go within
    # the second that a time is given in.
    compileall = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([sys.executable, *compileall, folder / "engine", folder / "kernels"], check=True)


class Slot:
    """Runs tests in a copy of its own, one fault at a time.

    Args:
        folder: of the copy, which is made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_copy(folder)
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "passive"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [folder / ".venv/bin/python", folder / "tests/mutants/forked_pytest.py"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, tests: tuple[str, ...], timeout_s: float) -> tuple[int, str]:
        """Run tests until the first failure.

        Args:
            tests: files or node ids.
            timeout_s: after which the run is ended.

        Returns:
            pytest's exit code, or TIMED_OUT, or 128 + signal; and what it printed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"tests": tests, "timeout_s": timeout_s}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), (self.folder / "output.txt").read_text()

    @contextlib.contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The copy with the fault in it, and without it afterwards."""
        path = self.folder / fault.file
        text = path.read_text()
        path.write_text(fault.planted(text))
        try:
            yield
        finally:
            path.write_text(text)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Slots:
    """Several slots below a folder; each serves one user at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        self._free: Queue[Slot] = Queue()
        for number in range(count):
            self._free.put(Slot(folder / f"copy{number}"))

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Slot]:
        """A slot that nobody uses; waits for one."""
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)

    def close(self) -> None:
        """End the processes, once nobody uses them."""
        while not self._free.empty():
            self._free.get().close()
