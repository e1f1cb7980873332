"""Where this process runs: its place among torchrun's, versions, devices, the git commit."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmim.version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "xformers",
    "nvidia-dali-cuda130",
    "timm",
)


@dataclass(frozen=True)
class Launch:
    """This process among those that torchrun started; alone where nothing started it.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on this machine.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of_environment(cls) -> "Launch":
        """Read torchrun's environment variables."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101")))

    @property
    def cores(self) -> int:
        """Processor cores that this process may use, as its share of the machine's."""
        return len(os.sched_getaffinity(0)) // self.local_size


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that can change a run; None where absent."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "simmim": __version__,
    }
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit() -> str | None:
    """Commit of the source tree this runs from, "-dirty" if changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def device_name(device: "torch.device") -> str:
    """The accelerator's name, or the processor's."""
    if device.type == "cuda":
        import torch  # which takes seconds, and a wrong flag needs none

        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: "torch.device", world_size: int) -> dict[str, Any]:
    """What a run records about its environment."""
    import torch

    return {
        "versions": package_versions(),
        "git_commit": git_commit(),
        "device": str(device),
        "device_name": device_name(device),
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": sys.argv,
    }
