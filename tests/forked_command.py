"""The `simmim` command, or a script, in a fork of a process that has imported everything.

A fresh interpreter imports for seconds; a fork of a server begins at once, and everything
else, from arguments and environment to signals and exit code, is that of a command. Tests of the
real command show that it starts.
"""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ),
    "OMP_NUM_THREADS": "1",
}
IMPORTED = ["simmim.pretrain", "simmim.downstream.finetune", "simmim.command_line", "torch._dynamo"]
OPTIONAL = ["simplejpeg", "matplotlib.pyplot", "lightning.pytorch"]

_context = get_context("forkserver")


class Started:
    """A command that runs, with the methods of `subprocess.Popen` that tests use.

    It leads its own session, as with `start_new_session=True`.

    Args:
        program: "simmim", or the path of a script.
        arguments: its arguments.
        environment: variables beside those of the tests.
    """

    def __init__(
        self, program: str | Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        _start_server()
        self.args = [str(program), *arguments]
        self._folder, self._texts = Path(tempfile.mkdtemp()), ["", ""]
        whole = dict(os.environ) | ENVIRONMENT | dict(environment or {})
        leads, led = _context.Pipe(duplex=False)
        given = (self.args, whole, str(self._folder), led)
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        led.close()
        leads.recv()  # from here on, a signal to its group finds one
        leads.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        if self._folder.exists():
            files = (self._folder / name for name in ("1", "2"))
            self._texts = [path.read_text() if path.exists() else "" for path in files]
            shutil.rmtree(self._folder)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and stderr."""
        self.wait(timeout)
        out, error = self._texts
        return out, error

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def finish(
    program: str | Path, *arguments: str, timeout: float = 600, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        program: "simmim", or the path of a script.
        arguments: its arguments.
        timeout: in seconds.
        processes: how many train together over gloo, as torchrun would start them; the result is
            that of the first, except the exit code, which is the first that is not 0.
    """
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        ranks = [str(rank) for rank in range(processes)]
        environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
    started = [Started(program, *arguments, environment=e) for e in environments]
    (out, error), *_ = [process.communicate(timeout) for process in started]
    code = next((p.returncode for p in started if p.returncode), 0)
    return subprocess.CompletedProcess(started[0].args, code, out, error)


def _start_server() -> None:
    wanted = [*IMPORTED, *(name for name in OPTIONAL if find_spec(name.partition(".")[0]))]
    _context.set_forkserver_preload(wanted)
    with pytest.MonkeyPatch.context() as patch:  # OpenMP reads its variable when it is loaded
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _run(args: list[str], environment: dict[str, str], folder: str, led: Connection) -> None:
    os.setsid()
    led.send(True)
    led.close()
    # a shell's background job inherits Ctrl-C as ignored, and Python then leaves it so
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        opened = os.open(os.path.join(folder, str(number)), os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = args
    if args[0] == "simmim":
        runpy.run_module("simmim", run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(args[0]).parent))
        runpy.run_path(args[0], run_name="__main__")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
