"""Builds the stand-in for CUDA's libraries, and reads what it counts.

    python tests/gpu_sim/cuda_host/stand_in.py -m pytest tests/gpu_sim/test_host_run.py

runs Python over it, with two cards.

It is one shared object that is loaded before all others: a CUDA build of torch then runs the whole
host path of a step without a GPU. Every launch succeeds and does nothing, so that launches, reads,
synchronisations, memory and the host's time are those of a real run, and values are not.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BUILT = FOLDER.parents[2] / "build" / "cuda_host"
NAME = "libcuda.so.1"  # by which Triton and torch find the driver
VARIABLE = "CUDA_HOST"  # its path, in the environment of a process that runs over it

KINDS = ("torch", "triton", "products", "collectives", "copies", "fills")
COUNTED = (
    *KINDS,
    *(f"captured_{kind}" for kind in KINDS),
    "graph_launches",
    "replayed",
    "reads",
    "synchronisations",
    "allocations",
    "frees",
    "bytes_in_use",
    "illegal_in_capture",
    "beside_capture",
)
# Libraries of torch that call CUDA, and the names of what they call there.
CALLERS = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
CALLED = re.compile(r" U ((?:cuda|cublas|nccl)[A-Z]\w*)")


@cache
def missing_reason() -> str | None:
    """Why the stand-in cannot be used here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the stand-in for CUDA is for Linux on x86-64"
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed"
    folder = Path(spec.origin).parent
    version = (folder / "version.py").read_text()
    if not (folder / "lib" / CALLERS[0]).exists() or "cuda: Optional[str] = '13" not in version:
        return "this torch is not a build for CUDA 13"
    return None


def build() -> Path:
    """The shared object, compiled unless it was before."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    sources = sorted(FOLDER.glob("*.[ch]"))
    digest = hashlib.sha256(libraries.as_posix().encode() + Path(__file__).read_bytes())
    for source in sources:
        digest.update(source.read_bytes())
    built = BUILT / digest.hexdigest()[:16] / NAME
    if built.exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    ours = [str(source) for source in sources if source.suffix == ".c"]
    called: set[str] = set()
    for name in CALLERS:
        if (libraries / name).exists():
            command = ["nm", "-D", "--undefined-only", str(libraries / name)]
            listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            called |= set(CALLED.findall(listed))
    rest = built.with_suffix(f".{os.getpid()}.c")
    rest.write_text(_refusals(sorted(called)))
    unfinished = built.with_suffix(f".{os.getpid()}")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
             "-fvisibility=hidden", f"-Wl,-soname,{NAME}"]  # fmt: skip
    command = ["gcc", *flags, f"-I{FOLDER}", *ours, str(rest), "-o", str(unfinished), "-ldl"]
    subprocess.run([*command, "-lpthread"], check=True)
    unfinished.rename(built)
    return built


def _refusals(names: list[str]) -> str:
    """C of what stands for calls that the sources lack: each says so and fails."""
    lines = ["#include <stdio.h>", '#include "stand_in.h"']
    lines += [
        f"EXPORT __attribute__((weak)) int {name}(void) {{"
        f' fprintf(stderr, "the stand-in for CUDA has no {name}\\n");'
        " return fail(NOT_SUPPORTED); }"
        for name in names
    ]
    return "\n".join(lines) + "\n"


def environment(devices: int = 1, memory_mib: int | None = None) -> dict[str, str]:
    """The environment of a process that runs over the stand-in.

    Args:
        devices: how many cards it shows.
        memory_mib: of a card; None is that of an H200.
    """
    library = build()
    found = dict(os.environ)
    found |= {
        VARIABLE: str(library),
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(BUILT / "triton"),
        "CUDA_HOST_DEVICES": str(devices),
    }
    if memory_mib is not None:
        found["CUDA_HOST_MEMORY_MIB"] = str(memory_mib)
    return found


def begin_again(**of_cards: Any) -> str | None:
    """Begin this process again over the stand-in, with the same arguments, unless it runs there.

    Args:
        of_cards: what `environment` takes.

    Returns:
        Why it cannot; None where it runs there already.
    """
    if VARIABLE in os.environ:
        return None
    if reason := missing_reason():
        return reason
    os.execve(sys.executable, [sys.executable, *sys.argv], environment(**of_cards))


class Counts:
    """What the process asked its stand-in for: a difference of two readings is what lies between.

    Raises:
        RuntimeError: the process does not run over the stand-in.
    """

    def __init__(self) -> None:
        if VARIABLE not in os.environ:
            raise RuntimeError("this process does not run over the stand-in for CUDA")
        self._library = ctypes.CDLL(os.environ[VARIABLE])
        self._counts: Any = (ctypes.c_long * len(COUNTED)).in_dll(self._library, "counts")

    def read(self) -> dict[str, int]:
        """All counts by name."""
        return dict(zip(COUNTED, self._counts, strict=True))

    def names(self) -> dict[str, int]:
        """Launches by the name of a kernel since the last call, if CUDA_HOST_NAMES is set."""
        path = BUILT / f"names.{os.getpid()}"
        self._library.cuda_host_write_names(str(path).encode())
        lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
        path.unlink()
        return {name: int(number) for number, name in lines}


if __name__ == "__main__":
    if reason := missing_reason():
        sys.exit(f"stand_in.py: {reason}")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment(devices=2))
